"""Measure teacher and student on one split. The teacher's rows come from its cache: no model is built for it."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, Field

from pipeline.config import EvaluateConfig
from pipeline.metrics import retention, retrieval_recall
from pipeline.runs import RunFolder
from storage.errors import UsageError
from storage.reader import EmbeddingReader

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
    cache, run, split = config.cache, config.run, config.split
    folder = RunFolder(run) if run else None
    record = folder.read() if folder else None
    if cache is None:
        if record is None:
            raise UsageError("nothing to evaluate: give --cache, --run or both")
        cache = record.config.cache
    path = folder.checkpoint_path(config.checkpoint) if folder else None
    reader = EmbeddingReader(cache)
    accepted: tuple[str, ...] = ()
    if record is not None:
        way_out = (
            f"{run} was trained on {record.config.cache}: evaluate on that, or accept a difference by "
            "--accept-mismatch FIELD (dataset, for a cache of other images), which the result then names."
        )
        # only view 0 is looked at here, and that is the evaluation crop in every cache, whatever was added since
        wanted = record.identity.model_copy(update={"views": reader.manifest.identity.views})
        accepted = reader.manifest.identity.require(wanted, cache, way_out, config.accept_mismatch)
    rows = reader.image_rows(split)
    if not len(rows):
        raise UsageError(f"{cache}: no image of split {split!r} has an embedding")
    reader.require_captions(rows)
    caption_rows, text_image = reader.caption_rows(rows)
    teacher = retrieval_recall(_unit(reader.take("image", rows)), _unit(reader.take("text", caption_rows)), text_image)
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
            reader,
            rows,
            caption_rows,
            # images of another dataset are where its own cache found them
            config.image_root or (reader.manifest.source.image_root if accepted else record.image_root),
            device,
            config.batch_size,
            config.workers,
            progress,
        )
        student = retrieval_recall(image, text, text_image)
        kept = retention(student, teacher)
    return EvaluateResult(
        split=split,
        images=len(rows),
        captions=len(caption_rows),
        quarantined=reader.manifest.identity.dataset.splits[split] - len(rows),
        cache=cache,
        cache_manifest_digest=reader.manifest.digest,
        accepted_mismatches=accepted,
        run=run,
        checkpoint=path.relative_to(folder.path).as_posix() if folder and path else None,
        chosen_on=record.best.split if record and record.best and config.checkpoint == "best" else None,
        teacher=teacher,
        student=student,
        retention=kept,
        student_parameters=record.student_parameters if record else None,
        seconds=time.perf_counter() - started,
    )


def _unit(rows: NDArray[Any]) -> NDArray[np.float32]:
    """float32 rows of unit norm: float16 storage moved the norm by up to 2^-11."""
    wide = rows.astype(np.float32)
    unit: NDArray[np.float32] = wide / np.linalg.norm(wide, axis=1, keepdims=True)
    return unit
