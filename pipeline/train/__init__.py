"""Training of a student from a cache."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from teacher_cache.pipeline.train.live_targets import LiveTeacherSource as LiveTeacherSource
    from teacher_cache.pipeline.train.loop import StepProgress as StepProgress
    from teacher_cache.pipeline.train.loop import TrainResult as TrainResult
    from teacher_cache.pipeline.train.loop import train as train

__all__ = ["LiveTeacherSource", "StepProgress", "TrainResult", "train"]

_HOMES = {
    "LiveTeacherSource": "live_targets",
    "StepProgress": "loop",
    "TrainResult": "loop",
    "train": "loop",
}


def __getattr__(name: str) -> Any:
    """Load a public name on first use (PEP 562)."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
