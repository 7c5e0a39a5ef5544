"""Training batches from a cache: order, targets, pixels and tokens by one iterator."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from teacher_cache.pipeline.data.batches.inputs import InputLoader as InputLoader
    from teacher_cache.pipeline.data.batches.loader import Batch as Batch
    from teacher_cache.pipeline.data.batches.loader import BatchLoader as BatchLoader
    from teacher_cache.pipeline.data.batches.pairs import PairOrder as PairOrder
    from teacher_cache.pipeline.data.batches.ready_pixels import ReadyPixels as ReadyPixels
    from teacher_cache.pipeline.data.batches.student_images import StudentImages as StudentImages
    from teacher_cache.pipeline.data.batches.targets import CachedTeacher as CachedTeacher

__all__ = ["Batch", "BatchLoader", "CachedTeacher", "InputLoader", "PairOrder", "ReadyPixels", "StudentImages"]

_HOMES = {
    "Batch": "loader",
    "BatchLoader": "loader",
    "CachedTeacher": "targets",
    "InputLoader": "inputs",
    "PairOrder": "pairs",
    "ReadyPixels": "ready_pixels",
    "StudentImages": "student_images",
}


def __getattr__(name: str) -> Any:
    """Load a public name on first use (PEP 562)."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
