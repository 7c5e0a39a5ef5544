"""Training of a student from a cache."""

from __future__ import annotations

from typing import TYPE_CHECKING

from teacher_cache.lazy_names import lazy_names

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

__getattr__ = lazy_names(__name__, _HOMES)
