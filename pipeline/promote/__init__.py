"""Promotion of students: champions, challengers and retraining."""

from __future__ import annotations

from typing import TYPE_CHECKING

from teacher_cache.lazy_names import lazy_names

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

__getattr__ = lazy_names(__name__, _HOMES)
