"""Training batches from a cache: order, targets, pixels and tokens by one iterator."""

from __future__ import annotations

from typing import TYPE_CHECKING

from teacher_cache.lazy_names import lazy_names

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

__getattr__ = lazy_names(__name__, _HOMES)
