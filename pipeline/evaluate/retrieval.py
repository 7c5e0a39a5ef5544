"""Recall of teacher and student on one split. The teacher's embeddings come from its cache.

``--ranks`` writes the rank of every query as a Parquet file, to compare a student with its teacher query by query:

    direction       ``i2t`` (the query is an image) or ``t2i`` (it is a caption); all of i2t first
    query           position of the image, or of the caption, in the split
    sample_id       sample_id of the image
    caption         text of the caption for t2i; null for i2t
    teacher_rank    rank of the first positive, from 1; null if there is none down to ``depth``
    student_rank    the same for the student; no such column without a student

The file's metadata has ``depth``, ``split``, ``cache``, ``cache_manifest_digest``, ``run`` and ``checkpoint``. The
queries that a student loses at R@1: ``teacher_rank = 1 AND (student_rank IS NULL OR student_rank > 1)``.
"""

from __future__ import annotations

import io
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from pydantic import BaseModel, Field

from teacher_cache.pipeline.evaluate.faiss_search import find_engine
from teacher_cache.pipeline.evaluate.intervals import (
    LEVEL,
    RESAMPLES,
    RecallIntervals,
    bootstrap_recalls,
    bootstrap_share,
)
from teacher_cache.pipeline.evaluate.learned import count_learned, find_learned_twins
from teacher_cache.pipeline.evaluate.recall import RECALL_KS, RetrievalRanks, chance_recall, recall_of_ranks, retention
from teacher_cache.pipeline.evaluate.several_teachers import OtherTeacher, measure_others
from teacher_cache.pipeline.evaluate.split import CachedTeacher, Embedded, EvaluationSplit, embed, open_split
from teacher_cache.pipeline.models.run_folder import RunFolder
from teacher_cache.pipeline.models.run_record import RunRecord
from teacher_cache.pipeline.settings.evaluate import EvaluateConfig
from teacher_cache.pipeline.settings.recipes import TEACHER_SPACE_LOSSES, in_teacher_space
from teacher_cache.storage.errors import UsageError
from teacher_cache.storage.files.local import LocalFiles
from teacher_cache.storage.files.new_files import out_file

RANK_DEPTH = 100
"""Depth of the ranks in a rank table."""

Progress = Callable[[str, int, int], None]
Recalls = dict[str, dict[str, float]]


class TowerResult(BaseModel, frozen=True):
    """Recall of one tower of a student against the teacher's cached rows of the other tower, in percent."""

    recall: Recalls
    retention: dict[str, Any]


class TwinsResult(BaseModel, frozen=True):
    """Measured images with a twin among those that a student learned from, and what it keeps without them."""

    images: int = Field(description="Number of measured images that show the same picture as one of training.")
    unread: int = Field(description="Number of measured images that were not compared: a picture cannot be read.")
    teacher: Recalls | None = Field(None, description="Recall without these images and their captions, in percent.")
    student: Recalls | None = None
    retention: dict[str, Any] | None = None


class EvaluateResult(BaseModel, frozen=True):
    """Recalls and retention in percent."""

    split: str
    images: int
    captions: int
    caption_kind: str | None = Field(None, description="Kind of the captions; None: all captions.")
    distinct_captions: int | None = Field(None, description="Number of different texts among the captions.")
    dataset: str | None = Field(None, description="Dataset of the cache, KIND:PATH.")
    teacher_name: str | None = Field(None, description="Name of the cached teacher.")
    quarantined: int = Field(description="Number of the split's images without an embedding, which are left out.")
    cache: str
    cache_manifest_digest: str
    accepted_mismatches: tuple[str, ...] = Field(description="Differences between this cache and the run's cache.")
    run: str | None
    learned_from: str | None = Field(None, description="Cache that the student learned from.")
    learned_images: int | None = Field(
        None, description="Number of these images that the student learned from; None where its cache cannot be read."
    )
    twins: TwinsResult | None = Field(
        None,
        description="Twins of these images in training; None without a run, on the split of the training, where the "
        "student's cache cannot be read, or for more than two billion pairs of images.",
    )
    checkpoint: str | None = Field(None, description="Folder of the student's checkpoint in the run.")
    chosen_on: str | None = Field(None, description="Split that the checkpoint was chosen on, if any.")
    unfinished: str | None = Field(None, description="Epochs trained and wanted, if the run is unfinished.")
    chance: Recalls | None = Field(None, description="Recall that a random order reaches on average.")
    teacher: Recalls
    other_teachers: tuple[OtherTeacher, ...] = Field((), description="Teachers of further caches.")
    together: Recalls | None = Field(None, description="Recall of all teachers by the mean of their logits.")
    student: Recalls | None
    retention: dict[str, Any] | None
    towers: dict[Literal["image", "text"], TowerResult] | None = Field(
        None, description="Recall of each tower by itself, projected to the teacher's width; with --towers."
    )
    student_parameters: int | None
    interval_level: float = Field(LEVEL, description="Share of the bootstrap's resamples within each interval.")
    interval_resamples: int = Field(RESAMPLES, description="Number of bootstrap resamples of the images.")
    teacher_intervals: RecallIntervals
    student_intervals: RecallIntervals | None
    retention_intervals: RecallIntervals | None = Field(
        description="Intervals of the retention, on the same resamples; None if a resample's denominator is 0."
    )
    ranks: str | None = Field(None, description="File with the rank of every query.")
    engine: str | None = Field(None, description="Search library and its version: faiss-cpu or faiss-gpu.")
    seconds: float
    date: str | None = Field(None, description="Date and time of the measurement, UTC.")
    not_kept: str | None = Field(None, description="Reason why the result is not saved in the run, if that failed.")


@dataclass(frozen=True)
class Measured:
    """A result with its split, and the ranks of the student if there is a run."""

    result: EvaluateResult
    split: EvaluationSplit
    student_ranks: RetrievalRanks | None


@dataclass(frozen=True)
class _Run:
    """A run, the checkpoint to measure, and its student with its model config."""

    folder: RunFolder
    record: RunRecord
    checkpoint: Path
    student: tuple[Any, dict[str, Any]]

    @property
    def checkpoint_name(self) -> str:
        return self.checkpoint.relative_to(self.folder.path).as_posix()


def evaluate(config: EvaluateConfig, progress: Progress | None = None) -> EvaluateResult:
    """Measure the recall of the cached teacher on a split, and the recall and retention of a run's student.

    Teachers of further caches are measured too, and all of them together; the retention is of the first one.

    Without a run no model is built and torch is not imported. With a run the result is also saved in its folder
    (``RunFolder.keep_evaluation``), if that is writable.

    Raises:
        UsageError: neither cache nor run is set, the split or checkpoint does not exist, FAISS cannot use the device,
            ranks cannot be written, or ``towers`` is set without a run or for a run outside the teacher's space.
        CacheMismatchError: the run was trained on another cache.
        CacheError: the cache is missing, unfinished or damaged.
    """
    return measure(config, progress).result


def measure(config: EvaluateConfig, progress: Progress | None = None) -> Measured:
    """Measure as :func:`evaluate` does, and also return the split and the ranks."""
    started = time.perf_counter()
    find_engine(config.device)  # checked before the long work
    rank_path = _rank_path(config.ranks)
    split = open_split(config)
    run = _open_run(config)
    if config.towers:
        _require_common_space(run, split.accepted_mismatches)
    depth = RANK_DEPTH if rank_path else max(RECALL_KS)
    teacher_rows = embed(split, CachedTeacher())
    teacher = split.ranks(*teacher_rows, depth, config.device)
    student = towers = together = twins = None
    others: tuple[OtherTeacher, ...] = ()
    if config.other_caches:
        others, together = measure_others(split, teacher_rows, config.other_caches, config.device, config.caption_kind)
    if run is not None:
        own, in_teacher_space = _student_rows(config, split, run.student, progress)
        student = split.ranks(*own, depth, config.device)
        twins = _without_twins(split, run.record, (teacher_rows, own), config.device, progress)
        if in_teacher_space is not None:
            towers = _each_tower(split, in_teacher_space, teacher_rows, recall_of_ranks(teacher), config.device)
    if rank_path:
        _write_ranks(rank_path, config, split, run, teacher, student)
    result = _result(config, split, run, teacher, student).model_copy(
        update={
            "towers": towers,
            "twins": twins,
            "other_teachers": others,
            "together": together,
            "seconds": time.perf_counter() - started,
        }
    )
    return Measured(result if run is None else _saved(run.folder, result), split, student)


def _without_twins(
    split: EvaluationSplit,
    record: RunRecord,
    rows: tuple[Embedded, Embedded],
    device: str,
    progress: Progress | None,
) -> TwinsResult | None:
    """Measure the rows of teacher and student again without the images that have a twin in training."""
    twins = find_learned_twins(record, split, progress)
    if twins is None:
        return None
    result = TwinsResult(images=twins.others_with_twin, unread=twins.unread)
    rest, images, captions = split.without({twin.twin_row for twin in twins.twins})
    if not result.images or not images.any():
        return result
    recalls = [recall_of_ranks(rest.ranks(image[images], text[captions], device=device)) for image, text in rows]
    update = {"teacher": recalls[0], "student": recalls[1], "retention": retention(recalls[1], recalls[0])}
    return result.model_copy(update=update)


def student_ranks(
    config: EvaluateConfig, split: EvaluationSplit, checkpoint: Path, depth: int, progress: Progress | None = None
) -> RetrievalRanks:
    """Rank a checkpoint's student on the images and captions of a split.

    Args:
        config: settings with batch size, device and workers; others are not used.
        depth: greatest rank to search.
    """
    from teacher_cache.pipeline.models.student import load_student

    own, _ = _student_rows(config, split, load_student(checkpoint), progress)
    return split.ranks(*own, depth, config.device)


def _open_run(config: EvaluateConfig) -> _Run | None:
    if not config.run:
        return None
    # imported here: the teacher's recall needs no torch
    from teacher_cache.pipeline.models.student import load_student

    folder = RunFolder(config.run)
    return _Run(folder, *folder.load_checkpoint(config.checkpoint, load_student))


def _rank_path(ranks: str | None) -> Path | None:
    path = out_file("--ranks", ranks, "ranks.parquet") if ranks else None
    if path is not None and path.suffix != ".parquet":
        raise UsageError(f"--ranks {ranks}: a Parquet file is written; let its name end in .parquet")
    return path


def _student_rows(
    config: EvaluateConfig, split: EvaluationSplit, loaded: tuple[Any, dict[str, Any]], progress: Progress | None
) -> tuple[Embedded, Embedded | None]:
    """Embed a split with a student: in its own space and, with ``towers``, in the teacher's."""
    from teacher_cache.pipeline.data.batches.inputs import InputLoader
    from teacher_cache.pipeline.data.batches.student_images import StudentImages
    from teacher_cache.pipeline.data.datasets.samples import ImageSource
    from teacher_cache.pipeline.evaluate.student_rows import StudentRows, projected
    from teacher_cache.pipeline.models.device import image_memory_format, keep_freed_memory, resolve_device
    from teacher_cache.pipeline.models.student import student_tokenizer

    device = resolve_device(config.device)
    keep_freed_memory(device)
    model, model_config = loaded
    model.model.visual.to(memory_format=image_memory_format(model.model))  # as in training
    images = StudentImages(split.reader, ImageSource(split.image_root), model.preprocess)
    tokenizer = student_tokenizer(model_config)
    with closing(InputLoader(split.reader, tokenizer, images, images, config.workers, device)) as inputs:
        own = embed(split, StudentRows(model.to(device), inputs, device, config.batch_size), progress)
    return own, projected(model, own) if config.towers else None


def _each_tower(
    split: EvaluationSplit, student: Embedded, teacher: Embedded, recalls: Recalls, device: str
) -> dict[Literal["image", "text"], TowerResult]:
    """Measure each tower of a student in the teacher's space, with the teacher's rows for the other tower."""

    def alone(images: NDArray[np.float32], captions: NDArray[np.float32]) -> TowerResult:
        recall = recall_of_ranks(split.ranks(images, captions, device=device))
        return TowerResult(recall=recall, retention=retention(recall, recalls))

    return {"image": alone(student[0], teacher[1]), "text": alone(teacher[0], student[1])}


def _require_common_space(run: _Run | None, accepted: tuple[str, ...]) -> None:
    """Check that the rows of a student and of the cached teacher may be compared."""
    if run is None:
        raise UsageError("--towers measures the towers of a student: give --run, or leave --towers out")
    record = run.record
    for config in (record.config, *(member.config for member in record.averaged)):
        if not in_teacher_space(config.losses):
            trained_by = ", ".join(name for name, weight in config.losses.items() if weight > 0)
            raise UsageError(
                f"{run.folder.path}: --towers needs a student in the teacher's space, and this one learned from "
                f"{trained_by}. Train with one of {', '.join(TEACHER_SPACE_LOSSES)}, or leave --towers out."
            )
    others = [name for name in (field.partition(":")[0] for field in accepted) if name.partition(".")[0] == "teacher"]
    if others:
        raise UsageError(
            f"{run.folder.path}: --towers needs a cache of the student's own teacher, and this cache differs in "
            f"{', '.join(others)}. Measure on another cache, or leave --towers out."
        )


def _write_ranks(
    path: Path,
    config: EvaluateConfig,
    split: EvaluationSplit,
    run: _Run | None,
    teacher: RetrievalRanks,
    student: RetrievalRanks | None,
) -> None:
    """Write the rank table atomically; an existing file is replaced."""
    images, captions = len(teacher.i2t), len(teacher.t2i)
    ids = pa.array(split.sample_ids, pa.string())
    columns = {
        "direction": pa.array(["i2t"] * images + ["t2i"] * captions),
        "query": pa.array(np.concatenate([np.arange(images), np.arange(captions)]), pa.int64()),
        "sample_id": pa.concat_arrays([ids, ids.take(pa.array(split.text_image))]),
        "caption": pa.concat_arrays([pa.nulls(images, pa.string()), pa.array(split.captions, pa.string())]),
        "teacher_rank": _rank_column(teacher),
    }
    about = {
        "depth": str(teacher.depth),
        "split": split.name,
        "cache": split.cache,
        "cache_manifest_digest": split.reader.manifest.digest,
    }
    if run is not None and student is not None:
        columns["student_rank"] = _rank_column(student)
        about |= {"run": str(config.run), "checkpoint": run.checkpoint_name}
    sink = io.BytesIO()
    pq.write_table(pa.table(columns).replace_schema_metadata(about), sink, compression="zstd")
    LocalFiles(str(path.parent)).write(path.name, sink.getvalue())


def _rank_column(ranks: RetrievalRanks) -> pa.Array:
    both = np.concatenate([ranks.i2t, ranks.t2i])
    return pa.array(both, pa.int32(), mask=both == 0)


def _result(
    config: EvaluateConfig,
    split: EvaluationSplit,
    run: _Run | None,
    teacher: RetrievalRanks,
    student: RetrievalRanks | None,
) -> EvaluateResult:
    """Return the result for the ranks of teacher and student."""
    teacher_recall, text_image = recall_of_ranks(teacher), split.text_image
    student_recall = recall_of_ranks(student) if student else None
    return EvaluateResult(
        split=split.name,
        images=len(split.image_rows),
        captions=len(split.caption_rows),
        caption_kind=config.caption_kind,
        distinct_captions=split.distinct_captions,
        dataset=split.reader.manifest.source.dataset,
        teacher_name=split.reader.identity.teacher.name,
        quarantined=split.quarantined,
        cache=split.cache,
        cache_manifest_digest=split.reader.manifest.digest,
        accepted_mismatches=split.accepted_mismatches,
        run=config.run,
        learned_from=run.record.config.cache if run else None,
        learned_images=count_learned(run.record, split.content_sha256, split.reader) if run else None,
        checkpoint=run.checkpoint_name if run else None,
        chosen_on=run.record.chosen_on(config.checkpoint) if run else None,
        unfinished=run.record.unfinished if run else None,
        chance=chance_recall(len(split.image_rows), len(split.caption_rows)),
        teacher=teacher_recall,
        student=student_recall,
        retention=retention(student_recall, teacher_recall) if student_recall else None,
        student_parameters=run.record.student_parameters if run else None,
        teacher_intervals=bootstrap_recalls(teacher, text_image),
        student_intervals=bootstrap_recalls(student, text_image) if student else None,
        retention_intervals=bootstrap_share(student, teacher, text_image) if student else None,
        ranks=config.ranks,
        engine=teacher.engine,
        seconds=0,
        date=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def _saved(folder: RunFolder, result: EvaluateResult) -> EvaluateResult:
    """Save the result in the run folder; if that fails, return it with the reason."""
    data = (result.model_dump_json(indent=2) + "\n").encode()
    try:
        split = "-".join(filter(None, (result.split, result.caption_kind)))
        folder.keep_evaluation(split, str(result.checkpoint), result.cache_manifest_digest, data)
    except OSError as error:
        return result.model_copy(update={"not_kept": f"{error.filename or folder.path}: {error.strerror or error}"})
    return result
