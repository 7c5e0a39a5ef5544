"""Checks of a cache: verify, the plan of a repair, and garbage."""

from __future__ import annotations

from typing import TYPE_CHECKING

from teacher_cache.lazy_names import lazy_names

if TYPE_CHECKING:
    from teacher_cache.storage.check.garbage import collect_garbage as collect_garbage
    from teacher_cache.storage.check.repair import plan_repair as plan_repair
    from teacher_cache.storage.check.repair import restore as restore
    from teacher_cache.storage.check.verify import Finding as Finding
    from teacher_cache.storage.check.verify import IntegrityReport as IntegrityReport
    from teacher_cache.storage.check.verify import verify_cache as verify_cache

__all__ = [
    "Finding",
    "IntegrityReport",
    "collect_garbage",
    "plan_repair",
    "restore",
    "verify_cache",
]

_HOMES = {
    "Finding": "verify",
    "IntegrityReport": "verify",
    "collect_garbage": "garbage",
    "plan_repair": "repair",
    "restore": "repair",
    "verify_cache": "verify",
}

__getattr__ = lazy_names(__name__, _HOMES)
