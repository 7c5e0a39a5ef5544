"""Recall, zero-shot accuracy and cost of teacher and student."""

from __future__ import annotations

from typing import TYPE_CHECKING

from teacher_cache.lazy_names import lazy_names

if TYPE_CHECKING:
    from teacher_cache.pipeline.evaluate.embed import BytesEncoder as BytesEncoder
    from teacher_cache.pipeline.evaluate.embed import CachedTeacher as CachedTeacher
    from teacher_cache.pipeline.evaluate.recall import first_positive_ranks as first_positive_ranks
    from teacher_cache.pipeline.evaluate.recall import recall_of_ranks as recall_of_ranks
    from teacher_cache.pipeline.evaluate.recall import retention as retention
    from teacher_cache.pipeline.evaluate.recall import retrieval_recall as retrieval_recall
    from teacher_cache.pipeline.evaluate.retrieval import EvaluateResult as EvaluateResult
    from teacher_cache.pipeline.evaluate.retrieval import evaluate as evaluate
    from teacher_cache.pipeline.evaluate.split import EvaluationSplit as EvaluationSplit
    from teacher_cache.pipeline.evaluate.split import open_split as open_split

__all__ = [
    "BytesEncoder",
    "CachedTeacher",
    "EvaluateResult",
    "EvaluationSplit",
    "evaluate",
    "first_positive_ranks",
    "open_split",
    "recall_of_ranks",
    "retention",
    "retrieval_recall",
]

_HOMES = {
    "BytesEncoder": "embed",
    "CachedTeacher": "embed",
    "EvaluateResult": "retrieval",
    "EvaluationSplit": "split",
    "evaluate": "retrieval",
    "first_positive_ranks": "recall",
    "open_split": "split",
    "recall_of_ranks": "recall",
    "retention": "recall",
    "retrieval_recall": "recall",
}

__getattr__ = lazy_names(__name__, _HOMES)
