"""Measure teacher and student on one split. The teacher's rows come from its cache: no model is built for it."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, Field, ValidationError

from teacher_cache.pipeline.evaluate.intervals import (
    LEVEL,
    RESAMPLES,
    RecallIntervals,
    bootstrap_recalls,
    bootstrap_share,
)
from teacher_cache.pipeline.evaluate.rank_table import RANK_DEPTH, write_rank_table
from teacher_cache.pipeline.evaluate.recall import RECALL_KS, RetrievalRanks, recall_of_ranks, retention
from teacher_cache.pipeline.evaluate.split import EvaluationSplit, open_split
from teacher_cache.pipeline.models.run_folder import RunFolder
from teacher_cache.pipeline.models.run_record import RunRecord
from teacher_cache.pipeline.settings.evaluate import EvaluateConfig
from teacher_cache.pipeline.settings.recipes import TEACHER_SPACE_LOSSES, in_teacher_space
from teacher_cache.storage.errors import UsageError
from teacher_cache.storage.files.new_files import out_file

__all__ = ["EvaluateResult", "Measured", "TowerResult", "evaluate", "measure", "student_ranks"]

Progress = Callable[[str, int, int], None]
Recalls = dict[str, dict[str, float]]
# of images and of captions
_Rows = tuple[NDArray[np.float32], NDArray[np.float32]]


class TowerResult(BaseModel, frozen=True):
    """One tower of a student, with the teacher's cached rows for what the other one would embed; in percent."""

    recall: Recalls
    retention: dict[str, Any]


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
    towers: dict[Literal["image", "text"], TowerResult] | None = Field(
        None, description="Each tower by itself, where that was asked for; projected to the teacher's width."
    )
    student_parameters: int | None
    interval_level: float = Field(LEVEL, description="Share of the bootstrap's resamples within each interval.")
    interval_resamples: int = Field(RESAMPLES, description="Resamples of the images, each with all its captions.")
    teacher_intervals: RecallIntervals
    student_intervals: RecallIntervals | None
    retention_intervals: RecallIntervals | None = Field(
        description="Student and teacher on the same resamples. None for a number that some resample does not have."
    )
    ranks: str | None = Field(None, description="File that the rank of every query was written to.")
    seconds: float
    date: str | None = Field(None, description="And time at which it was measured, UTC; older versions name none.")
    not_kept: str | None = Field(None, description="Why it was not left in the run, where that failed.")


@dataclass(frozen=True)
class Measured:
    """A result with what it was worked out of.

    Attributes:
        student_ranks: None without a run.
        depth: how far down ranks were looked for.
    """

    result: EvaluateResult
    split: EvaluationSplit
    teacher_ranks: RetrievalRanks
    student_ranks: RetrievalRanks | None
    depth: int


def evaluate(config: EvaluateConfig, progress: Progress | None = None) -> EvaluateResult:
    """Recall of the cached teacher on a split, and of a run's student with what it retains.

    Without a run no model is built and no torch imported. With one the result is left in its folder too
    (``RunFolder.keep_evaluation``), where that can be written.

    Raises:
        UsageError: neither cache nor run given, an unknown split, a run without such a checkpoint, ranks that cannot
            be written where they are wanted, or towers of no run, or of one that has no space in common with the
            teacher.
        CacheMismatchError: the run was trained on another cache than the one given.
        CacheError: the cache is missing, unfinished or damaged.
    """
    return measure(config, progress).result


def student_ranks(
    config: EvaluateConfig, split: EvaluationSplit, checkpoint: Path, depth: int, progress: Progress | None = None
) -> RetrievalRanks:
    """Ranks of the student of a checkpoint's folder on the images and captions of a split.

    Args:
        config: batch size, device and workers are taken from it.
        depth: how far down to look.
    """
    own, _ = _embedded(config, split, checkpoint, progress)
    return split.ranks(*own, depth)


def _embedded(
    config: EvaluateConfig, split: EvaluationSplit, checkpoint: Path, progress: Progress | None
) -> tuple[_Rows, _Rows | None]:
    """A student's images and captions of a split, in its own space and, for its towers, in the teacher's."""
    # torch only from here on: the teacher's recall needs none
    from teacher_cache.pipeline.data.batches.inputs import InputLoader
    from teacher_cache.pipeline.data.batches.student_images import StudentImages
    from teacher_cache.pipeline.data.datasets.samples import ImageSource
    from teacher_cache.pipeline.evaluate.encode import encode_rows, projected
    from teacher_cache.pipeline.models.device import image_memory_format, keep_freed_memory, resolve_device
    from teacher_cache.pipeline.models.student import load_student, student_tokenizer

    device = resolve_device(config.device)
    keep_freed_memory(device)
    model, model_config = load_student(checkpoint)
    model.model.visual.to(memory_format=image_memory_format(model.model))  # as it was trained
    images = StudentImages(split.reader, ImageSource(split.image_root), model.preprocess)
    tokenizer = student_tokenizer(model_config)
    with closing(InputLoader(split.reader, tokenizer, images, images, config.workers, device)) as inputs:
        image, text = encode_rows(
            model.to(device),
            split.image_rows,
            split.captions,
            inputs,
            device,
            config.batch_size,
            progress,
        )
    return (image, text), projected(model, image, text) if config.towers else None


def _each_tower(split: EvaluationSplit, rows: _Rows, teacher: Recalls) -> dict[Literal["image", "text"], TowerResult]:
    """Of a student's images and captions in the teacher's space."""
    image, text = rows

    def alone(images: NDArray[np.float32], captions: NDArray[np.float32]) -> TowerResult:
        recall = recall_of_ranks(split.ranks(images, captions))
        return TowerResult(recall=recall, retention=retention(recall, teacher))

    return {"image": alone(image, split.teacher_text()), "text": alone(split.teacher_image(), text)}


def _require_common_space(run: str | None, record: RunRecord | None, accepted: tuple[str, ...]) -> None:
    if record is None:
        raise UsageError("towers are of a student, and no run is named: give --run, or leave --towers out")
    for losses in (config.losses for config in (record.config, *(each.config for each in record.averaged))):
        if not in_teacher_space(losses):
            trained_by = ", ".join(name for name, weight in losses.items() if weight > 0)
            raise UsageError(
                f"{run}: trained by {trained_by}, which leaves it a space of its own: its rows cannot stand beside the "
                f"teacher's, as --towers wants. Train with one of {', '.join(TEACHER_SPACE_LOSSES)}."
            )
    others = [name for name in (each.partition(":")[0] for each in accepted) if name.partition(".")[0] == "teacher"]
    if others:
        raise UsageError(
            f"{run}: of another teacher than this cache's ({', '.join(others)}), so that its rows cannot stand beside "
            "them as --towers wants. Leave --towers out, or measure on a cache of its own teacher."
        )


def measure(config: EvaluateConfig, progress: Progress | None = None) -> Measured:
    """As :func:`evaluate`, with the ranks of all queries."""
    started = time.perf_counter()
    run = config.run
    folder = RunFolder(run) if run else None
    record = folder.read() if folder else None
    path = folder.checkpoint_path(config.checkpoint) if folder else None
    rank_path = out_file("--ranks", config.ranks, "ranks.parquet") if config.ranks else None
    if rank_path is not None and rank_path.suffix != ".parquet":
        raise UsageError(f"--ranks {config.ranks}: a Parquet file is written; let its name end in .parquet")
    split = open_split(config)
    if config.towers:
        _require_common_space(run, record, split.accepted_mismatches)
    depth = RANK_DEPTH if rank_path else max(RECALL_KS)
    teacher_ranks = split.teacher_ranks(depth)
    teacher = recall_of_ranks(teacher_ranks)
    ranks = student = kept = towers = None
    if path is not None and record is not None:
        own, in_teachers_space = _embedded(config, split, path, progress)
        ranks = split.ranks(*own, depth)
        student = recall_of_ranks(ranks)
        kept = retention(student, teacher)
        towers = _each_tower(split, in_teachers_space, teacher) if in_teachers_space else None
    checkpoint = path.relative_to(folder.path).as_posix() if folder and path else None
    if rank_path:
        write_rank_table(rank_path, split, teacher_ranks, ranks, run, checkpoint)
    text_image = split.text_image
    result = EvaluateResult(
        split=split.name,
        images=len(split.image_rows),
        captions=len(split.caption_rows),
        quarantined=split.quarantined,
        cache=split.cache,
        cache_manifest_digest=split.reader.manifest.digest,
        accepted_mismatches=split.accepted_mismatches,
        run=run,
        checkpoint=checkpoint,
        chosen_on=record.chosen_on(config.checkpoint) if record else None,
        teacher=teacher,
        student=student,
        retention=kept,
        towers=towers,
        student_parameters=record.student_parameters if record else None,
        teacher_intervals=bootstrap_recalls(teacher_ranks, text_image),
        student_intervals=bootstrap_recalls(ranks, text_image) if ranks else None,
        retention_intervals=bootstrap_share(ranks, teacher_ranks, text_image) if ranks else None,
        ranks=config.ranks,
        seconds=time.perf_counter() - started,
        date=datetime.now(UTC).isoformat(timespec="seconds"),
    )
    result = result if folder is None else _kept(folder, result)
    return Measured(result, split, teacher_ranks, ranks, depth)


def _kept(folder: RunFolder, result: EvaluateResult) -> EvaluateResult:
    """The result, left in the run; a folder that cannot be written costs the file, not what was measured.

    Measured without its towers, it keeps those of an earlier result that is otherwise the same.
    """
    of = (result.split, str(result.checkpoint), result.cache_manifest_digest)
    left = result
    if result.towers is None:
        with contextlib.suppress(OSError, ValidationError):
            earlier = EvaluateResult.model_validate_json(folder.evaluation_path(*of).read_bytes())
            if (earlier.teacher, earlier.student) == (result.teacher, result.student):
                left = result.model_copy(update={"towers": earlier.towers})
    try:
        folder.keep_evaluation(*of, (left.model_dump_json(indent=2) + "\n").encode())
    except OSError as error:
        return result.model_copy(update={"not_kept": f"{error.filename or folder.path}: {error.strerror or error}"})
    return result
