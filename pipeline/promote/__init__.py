"""Promotion of students: champions, challengers and retraining."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from teacher_cache.pipeline.promote.gate import PromoteResult as PromoteResult
    from teacher_cache.pipeline.promote.gate import promote as promote
    from teacher_cache.pipeline.promote.gate import roll_back as roll_back
    from teacher_cache.pipeline.promote.registry import Candidate as Candidate
    from teacher_cache.pipeline.promote.registry import StudentRegistry as StudentRegistry
    from teacher_cache.pipeline.promote.retrain import Retraining as Retraining
    from teacher_cache.pipeline.promote.retrain import RetrainResult as RetrainResult

__all__ = ["Candidate", "PromoteResult", "RetrainResult", "Retraining", "StudentRegistry", "promote", "roll_back"]

_HOMES = {
    "Candidate": "registry",
    "PromoteResult": "gate",
    "RetrainResult": "retrain",
    "Retraining": "retrain",
    "StudentRegistry": "registry",
    "promote": "gate",
    "roll_back": "gate",
}


def __getattr__(name: str) -> Any:
    """Load a public name on first use (PEP 562)."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
