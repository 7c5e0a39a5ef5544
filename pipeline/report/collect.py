"""Collection of a report's data. No torch.

Embeddings are read once (``teacher_cache.storage.look.stats.read_drawn``): statistics, recall, map and pairs use the
same rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any, Literal, TypedDict, Unpack

import numpy as np

from teacher_cache.pipeline.data.batches.stored_images import CachedImages
from teacher_cache.pipeline.data.datasets.samples import ImageSource
from teacher_cache.pipeline.evaluate.sampled import rank_rows
from teacher_cache.pipeline.report.data import (
    LostImage,
    ReportData,
    RowMap,
    TeacherBeside,
    as_utf8,
)
from teacher_cache.pipeline.report.pairs import retrieved_pairs
from teacher_cache.pipeline.report.row_map import row_map
from teacher_cache.pipeline.report.students import read_deployments, read_runs
from teacher_cache.pipeline.report.thumbnails import collect_pictures
from teacher_cache.pipeline.train.compare.result import Comparison, read_comparison
from teacher_cache.storage.errors import CacheIncompleteError, UsageError
from teacher_cache.storage.files.location import open_files
from teacher_cache.storage.format.commits import QuarantinedRow
from teacher_cache.storage.format.manifest_file import read_manifest
from teacher_cache.storage.format.table_rows import TableRows
from teacher_cache.storage.format.tables import SAMPLES
from teacher_cache.storage.look.info import CacheInfo, ChunkState, chunk_states, describe_cache
from teacher_cache.storage.look.side_by_side import read_side_by_side
from teacher_cache.storage.look.stats import CacheStats, DrawnRows, read_drawn, stats_of
from teacher_cache.storage.read.reader import EmbeddingReader

_PAIRS = 12  # each way
_LOST_NAMED = 200
_MAP_IMAGES = 2_000
_MAP_SIDE, _PAIR_SIDE = 80, 224  # pixels

Progress = Callable[[str, int, int], None]


class ReportOptions(TypedDict, total=False):
    """Options of :func:`collect_report`."""

    image_root: str | None
    """Folder of the images. Default: that of the cache."""
    split: str | None
    """Split for statistics, map and pairs. Default: all images."""
    most: int
    """Maximum number of images to read; a sample if there are more. Default: 20,000."""
    seed: int
    """Seed of samples. Default: 0."""
    compared: str | None
    """Folder of a comparison of teachers to show. Default: none."""
    others: Sequence[str]
    """Caches of other teachers to show beside it. Default: none."""
    unmatched: Literal["refuse", "drop"]
    """Images that one of them lacks, or lacks a caption of: refuse, or leave them out there. Default: "refuse"."""
    whole: bool
    """False for neither a map nor pictures: for its charts alone. Default: true."""


_DEFAULTS = ReportOptions(
    image_root=None, split=None, most=20_000, seed=0, compared=None, others=(), unmatched="refuse", whole=True
)


def collect_report(
    location: str,
    runs: Sequence[str] = (),
    deployed: Sequence[str] = (),
    *,
    progress: Progress | None = None,
    **options: Unpack[ReportOptions],
) -> ReportData:
    """Read a cache, runs that were trained on it, and deployed students.

    Without a sealed cache there are no statistics, map, pairs and pictures; a note says what to do.

    Args:
        runs, deployed: folders.
        progress: called with (stage, done, total).
        options: see :class:`ReportOptions`.

    Raises:
        UsageError: the split does not exist, a folder has no run or no deployed student, or another teacher's cache
            lacks an image or a caption.
        CacheError: the cache is missing, damaged or cannot be read.
        ModuleNotFoundError: scikit-learn is not installed.
    """
    settings: ReportOptions = {**_DEFAULTS, **options}
    progress = progress or (lambda stage, done, total: None)
    info = describe_cache(location)
    # folders first: a wrong name fails before minutes of work
    run_reports, run_notes = read_runs(runs, info.manifest_digest)
    tables, table_notes = read_deployments(deployed, info.manifest_digest)
    notes = run_notes + table_notes
    compared = None if settings["compared"] is None else _compared(settings["compared"], info)
    teachers = _teachers(location, settings, notes, progress)
    states = chunk_states(location)
    shown: dict[str, Any] = {}
    reader = None
    try:
        drawn = read_drawn(location, settings["split"], most=settings["most"], seed=settings["seed"], progress=progress)
    except CacheIncompleteError as error:
        notes.insert(0, f"No statistics, map and pairs yet: {error}")
    else:
        reader = drawn.reader
        shown = _embeddings(drawn, settings["whole"], notes, progress)
    lost, lost_of = _lost(location, states, reader)
    if lost_of > len(lost):
        notes.append(f"The first {len(lost):,} of {lost_of:,} quarantined images are named; commits/image has all.")
    report = ReportData(
        location=location,
        made=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        version=version("teacher-cache"),
        info=info.model_copy(update={"location": as_utf8(location)}),
        lost=lost,
        runs=run_reports,
        deployments=tables,
        teachers=teachers,
        compared=compared,
        **shown,
    )
    pictures: dict[int, str] = {}
    if reader is not None and settings["whole"]:
        sides = _sides(report)
        root = settings["image_root"] or reader.manifest.source.image_root
        images = CachedImages(reader, ImageSource(root), sides)
        pictures, missing = collect_pictures(
            images, sides, {image.row for image in lost}, lambda done, total: progress("pictures", done, total)
        )
        notes += [missing] if missing else []
    return report.model_copy(update={"pictures": pictures, "notes": tuple(map(as_utf8, notes))})


def _compared(folder: str, info: CacheInfo) -> Comparison:
    result = read_comparison(folder)
    if info.manifest_digest not in [one.cache_manifest_digest for one in result.teachers]:
        caches = ", ".join(one.cache for one in result.teachers)
        raise UsageError(f"{folder}: compares {caches}, and not {info.location}; report one of those")
    return result


def _teachers(
    location: str, settings: ReportOptions, notes: list[str], progress: Progress
) -> tuple[TeacherBeside, ...]:
    """Return this cache's teacher and the others, measured on the same images. Adds to the notes."""
    if not settings["others"]:
        return ()
    locations, drop = (location, *settings["others"]), settings["unmatched"] == "drop"
    drawn, dropped = read_side_by_side(locations, settings["split"], settings["most"], settings["seed"], drop, progress)
    if dropped:
        notes.append(f"Teachers side by side: without {dropped:,} images that a cache lacks, or lacks a caption of.")
    return tuple(_teacher_beside(rows) for rows in drawn)


def _teacher_beside(drawn: DrawnRows) -> TeacherBeside:
    stats, ranked = stats_of(drawn), rank_rows(drawn, depth=10)
    return TeacherBeside(
        location=drawn.reader.location,
        teacher=drawn.reader.identity.teacher.name,
        separation=stats.separation,
        image_rank=stats.image.effective_rank,
        text_rank=stats.text.effective_rank,
        recall=ranked.recall if ranked else None,
    )


def _sides(report: ReportData) -> dict[int, int]:
    """Return the longest side in pixels of each picture, by image row."""
    pairs = report.hardest + report.best
    rows = [row for pair in pairs for row in (pair.image_row, pair.first_image_row) if row is not None]
    rows += [image.row for image in report.lost]
    rows += [row for alike in report.stats.nearest_pairs for row in alike.rows] if report.stats is not None else []
    sides = dict.fromkeys(rows, _PAIR_SIDE)
    for point in report.row_map.points if report.row_map is not None else ():
        sides.setdefault(point.image_row, _MAP_SIDE)
    return sides


def _embeddings(drawn: DrawnRows, with_map: bool, notes: list[str], progress: Progress) -> dict[str, Any]:
    """Return the fields of a report that are made of embeddings, all of the same rows. Adds to the notes."""
    stats, ranked = stats_of(drawn, progress=progress), rank_rows(drawn, progress=progress)
    recall = ranked.recall if ranked else None
    hardest, best, pairs_of = ((), (), 0) if ranked is None else retrieved_pairs(drawn.reader, ranked, _PAIRS)
    on_map = None
    if with_map:
        progress("map", 0, 1)
        captions = not stats.without_caption
        on_map = row_map(drawn.reader, drawn.usable, _MAP_IMAGES, drawn.seed, captions=captions)
        progress("map", 1, 1)
    notes += _notes(stats, recall.images if recall else None, on_map)
    return {
        "stats": stats.model_copy(update={"location": as_utf8(stats.location)}),
        "recall": recall,
        "row_map": on_map,
        "hardest": hardest,
        "best": best,
        "pairs_of": pairs_of,
    }


def _notes(stats: CacheStats, ranked: int | None, on_map: RowMap | None) -> list[str]:
    """Return notes on samples and missing parts."""
    notes = []
    read, rows = stats.image.rows_read, stats.image.rows
    if stats.sampled:
        notes.append(
            f"Statistics are of {read:,} of {rows:,} images and their captions, drawn with seed {stats.seed}; --most "
            "reads more."
        )
    if stats.without_caption:
        notes.append(
            f"No pairs and no recall: {stats.without_caption:,} of {read:,} images have no caption. If the captions "
            "are prompts of classes, teacher-cache zero-shot measures them."
        )
    elif ranked is None:
        notes.append("No pairs and no recall: no image that was read has an embedding and a caption with one.")
    usable = read - stats.image.missing - stats.image.zero
    if ranked is not None and ranked < usable:
        notes.append(f"Recall and pairs are among {ranked:,} of the {usable:,} images that were read, drawn at random.")
    on = 0 if on_map is None else sum(point.tower == "image" for point in on_map.points)
    if on_map is not None and on < on_map.images_of:
        notes.append(f"On the map are {on:,} of {on_map.images_of:,} images, drawn at random.")
    return notes


def _lost(
    location: str, states: Sequence[ChunkState], reader: EmbeddingReader | None
) -> tuple[tuple[LostImage, ...], int]:
    """Return the first quarantined images, without duplicates, and the number of all."""
    if reader is not None and any(state.quarantined is None for state in states):
        quarantined = {row.row: row for row in reader.quarantined}
    else:  # of several views the first counts
        quarantined = {row.row: row for state in reversed(states) for row in state.quarantined or ()}
    named = [quarantined[row] for row in sorted(quarantined)[:_LOST_NAMED]]
    if not named:
        return (), 0
    files = open_files(location)
    rows = np.array([row.row for row in named], np.int64)
    manifest = read_manifest(files) if reader is None else reader.manifest
    uris = TableRows(files, manifest, SAMPLES, columns=["uri"]).take(rows)["uri"].to_pylist()
    lost = tuple(
        LostImage(row=row.row, sample_id=row.sample_id, uri=uri, reason=_reason(row))
        for row, uri in zip(named, uris, strict=True)
    )
    return lost, len(quarantined)


def _reason(row: QuarantinedRow) -> str:
    return f"{row.reason}: {row.detail}" if row.detail else row.reason
