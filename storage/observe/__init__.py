"""Log lines, progress bars, metrics, and removal of secrets from texts."""

from __future__ import annotations

from typing import TYPE_CHECKING

from teacher_cache.lazy_names import lazy_names

if TYPE_CHECKING:
    from teacher_cache.storage.observe.logs import event as event
    from teacher_cache.storage.observe.logs import logger as logger
    from teacher_cache.storage.observe.logs import say as say
    from teacher_cache.storage.observe.progress import StageProgress as StageProgress
    from teacher_cache.storage.observe.safe_text import printable as printable
    from teacher_cache.storage.observe.safe_text import redact as redact
    from teacher_cache.storage.observe.telemetry import observed as observed

__all__ = [
    "StageProgress",
    "event",
    "logger",
    "observed",
    "printable",
    "redact",
    "say",
]

_HOMES = {
    "StageProgress": "progress",
    "event": "logs",
    "logger": "logs",
    "observed": "telemetry",
    "printable": "safe_text",
    "redact": "safe_text",
    "say": "logs",
}

__getattr__ = lazy_names(__name__, _HOMES)
