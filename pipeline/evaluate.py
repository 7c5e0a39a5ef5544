"""Measure teacher and student on one split. The teacher's rows come from its cache: no model is built for it."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from pydantic import BaseModel, Field

from pipeline.config import EvaluateConfig
from pipeline.evaluation_split import open_split
from pipeline.metrics import recall_of_ranks, retention
from pipeline.runs import RunFolder

__all__ = ["EvaluateResult", "evaluate"]

Recalls = dict[str, dict[str, float]]


class EvaluateResult(BaseModel, frozen=True):
    """Recalls and retention in percent."""

    split: str
    images: int
    captions: int
    quarantined: int = Field(description="Images of the split left out because they have no embedding.")
    cache: str
    cache_manifest_digest: str
    accepted_mismatches: tuple[str, ...] = Field(description="Between this cache and that of the run.")
    run: str | None
    checkpoint: str | None = Field(None, description="Folder of the student's checkpoint in the run.")
    chosen_on: str | None = Field(None, description="Split that this checkpoint was chosen on, for one that was.")
    teacher: Recalls
    student: Recalls | None
    retention: dict[str, Any] | None
    student_parameters: int | None
    seconds: float


def evaluate(config: EvaluateConfig, progress: Callable[[str, int, int], None] | None = None) -> EvaluateResult:
    """Recall of the cached teacher on a split, and of a run's student with what it retains.

    Without a run no model is built and no torch imported.

    Raises:
        UsageError: neither cache nor run given, an unknown split, or a run without such a checkpoint.
        CacheMismatchError: the run was trained on another cache than the one given.
        CacheError: the cache is missing, unfinished or damaged.
    """
    started = time.perf_counter()
    run = config.run
    folder = RunFolder(run) if run else None
    record = folder.read() if folder else None
    path = folder.checkpoint_path(config.checkpoint) if folder else None
    split = open_split(config)
    teacher = recall_of_ranks(split.teacher_ranks())
    student = kept = None
    if path is not None and record is not None:
        # torch only from here on: the teacher's recall needs none
        from pipeline.device import resolve_device
        from pipeline.encode_student import encode_rows
        from pipeline.student import load_student

        device = resolve_device(config.device)
        model, model_config = load_student(path)
        image, text = encode_rows(
            model.to(device),
            model_config,
            split.reader,
            split.image_rows,
            split.caption_rows,
            split.image_root,
            device,
            config.batch_size,
            config.workers,
            progress,
        )
        student = recall_of_ranks(split.ranks(image, text))
        kept = retention(student, teacher)
    return EvaluateResult(
        split=split.name,
        images=len(split.image_rows),
        captions=len(split.caption_rows),
        quarantined=split.quarantined,
        cache=split.cache,
        cache_manifest_digest=split.reader.manifest.digest,
        accepted_mismatches=split.accepted_mismatches,
        run=run,
        checkpoint=path.relative_to(folder.path).as_posix() if folder and path else None,
        chosen_on=record.best.split if record and record.best and config.checkpoint == "best" else None,
        teacher=teacher,
        student=student,
        retention=kept,
        student_parameters=record.student_parameters if record else None,
        seconds=time.perf_counter() - started,
    )
