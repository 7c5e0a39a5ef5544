"""Collection of a report's data. No torch.

Embeddings are read once (``teacher_cache.storage.look.stats.read_drawn``): statistics, recall, map and pairs use the
same rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from itertools import groupby
from typing import TypedDict, Unpack

import numpy as np

from teacher_cache.pipeline.data.batches.stored_images import CachedImages
from teacher_cache.pipeline.data.datasets.samples import ImageSource
from teacher_cache.pipeline.evaluate.sampled import SampledRecall, rank_rows
from teacher_cache.pipeline.report.data import (
    CoverageCell,
    CoverageMap,
    LostImage,
    ReportData,
    RetrievedPair,
    RowMap,
    as_utf8,
)
from teacher_cache.pipeline.report.pairs import retrieved_pairs
from teacher_cache.pipeline.report.row_map import row_map
from teacher_cache.pipeline.report.students import read_deployments, read_runs
from teacher_cache.pipeline.report.thumbnails import collect_pictures
from teacher_cache.storage.errors import CacheIncompleteError
from teacher_cache.storage.files.location import open_files
from teacher_cache.storage.format.commits import QuarantinedRow
from teacher_cache.storage.format.manifest_file import read_manifest
from teacher_cache.storage.format.table_rows import TableRows
from teacher_cache.storage.format.tables import SAMPLES
from teacher_cache.storage.look.info import ChunkState, chunk_states, describe_cache
from teacher_cache.storage.look.stats import CacheStats, read_drawn, stats_of
from teacher_cache.storage.read.reader import EmbeddingReader

__all__ = ["ReportOptions", "collect_report"]

_CELLS = 400
_PAIRS = 12  # each way
_LOST_NAMED = 200
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
    map_images: int
    """Maximum number of images on the map; 0 for no map. Default: 2,000."""
    pictures: bool
    """Whether to show pictures of the images. Default: true."""
    seed: int
    """Seed of samples. Default: 0."""


_DEFAULTS = ReportOptions(image_root=None, split=None, most=20_000, map_images=2_000, pictures=True, seed=0)


@dataclass(frozen=True)
class _Embeddings:
    """Statistics, map and pairs of a cache's embeddings; empty if the cache is not sealed."""

    stats: CacheStats | None = None
    recall: SampledRecall | None = None
    row_map: RowMap | None = None
    hardest: tuple[RetrievedPair, ...] = ()
    best: tuple[RetrievedPair, ...] = ()
    pairs_of: int = 0

    def sides(self, lost: Sequence[LostImage]) -> dict[int, int]:
        """Return the longest side in pixels of each picture, by image row."""
        sides = dict.fromkeys(_rows_of_pairs(self.hardest + self.best), _PAIR_SIDE)
        sides |= {image.row: _PAIR_SIDE for image in lost}
        for alike in self.stats.nearest_pairs if self.stats is not None else ():
            sides |= dict.fromkeys(alike.rows, _PAIR_SIDE)
        for point in self.row_map.points if self.row_map is not None else ():
            sides.setdefault(point.image_row, _MAP_SIDE)
        return sides


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
        UsageError: the split does not exist, or a folder has no run or no deployed student.
        CacheError: the cache is missing, damaged or cannot be read.
        ModuleNotFoundError: scikit-learn is not installed.
    """
    settings: ReportOptions = {**_DEFAULTS, **options}
    info = describe_cache(location)
    notes: list[str] = []
    # folders first: a wrong name fails before minutes of work
    run_reports, run_notes = read_runs(runs, info.manifest_digest)
    tables, table_notes = read_deployments(deployed, info.manifest_digest)
    notes += run_notes + table_notes
    states = chunk_states(location)
    try:
        reader = EmbeddingReader(location)
    except CacheIncompleteError as error:
        notes.insert(0, f"No statistics, map and pairs yet: {error}")
        reader = None
    shown = _Embeddings() if reader is None else _embeddings(reader, settings, notes, progress)
    lost, lost_of = _lost(location, states, reader)
    if lost_of > len(lost):
        notes.append(f"The first {len(lost):,} of {lost_of:,} quarantined images are named; commits/image has all.")
    pictures: dict[int, str] = {}
    if reader is not None and settings["pictures"]:
        sides = shown.sides(lost)
        root = settings["image_root"] or reader.manifest.source.image_root
        images = CachedImages(reader, ImageSource(root), sides)
        stage = None if progress is None else lambda done, total: progress("pictures", done, total)
        pictures, missing = collect_pictures(images, sides, {image.row for image in lost}, stage)
        notes += [missing] if missing else []
    return ReportData(
        location=location,
        made=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        version=version("teacher-cache"),
        info=info.model_copy(update={"location": as_utf8(location)}),
        coverage=_coverage(states),
        stats=shown.stats and shown.stats.model_copy(update={"location": as_utf8(location)}),
        recall=shown.recall,
        row_map=shown.row_map,
        hardest=shown.hardest,
        best=shown.best,
        pairs_of=shown.pairs_of,
        lost=lost,
        runs=run_reports,
        deployments=tables,
        pictures=pictures,
        notes=tuple(notes),
    )


def _embeddings(
    reader: EmbeddingReader, settings: ReportOptions, notes: list[str], progress: Progress | None
) -> _Embeddings:
    """Read embeddings once for statistics, pairs and map. Adds to the notes."""
    seed = settings["seed"]
    drawn = read_drawn(reader.location, settings["split"], most=settings["most"], seed=seed, progress=progress)
    stats, ranked = stats_of(drawn, progress=progress), rank_rows(drawn, progress=progress)
    recall = ranked.recall if ranked else None
    hardest, best, pairs_of = ((), (), 0) if ranked is None else retrieved_pairs(reader, ranked, _PAIRS)
    on_map = None
    if settings["map_images"]:
        report = progress or (lambda stage, done, total: None)
        report("map", 0, 1)
        on_map = row_map(reader, drawn.usable, settings["map_images"], seed, captions=not stats.without_caption)
        report("map", 1, 1)
    notes += _notes(stats, recall.images if recall else None, on_map)
    return _Embeddings(stats, recall, on_map, hardest, best, pairs_of)


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
            f"No pairs and no recall: {stats.without_caption:,} of {read:,} images have no caption. The captions of "
            "labelled images are prompts of their classes; teacher-cache zero-shot measures those."
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


def _rows_of_pairs(pairs: Sequence[RetrievedPair]) -> list[int]:
    rows = [row for pair in pairs for row in (pair.image_row, pair.first_image_row)]
    return [row for row in rows if row is not None]


def _coverage(states: Sequence[ChunkState]) -> tuple[CoverageMap, ...]:
    """Return a coverage map of each view and of the captions, with at most ``_CELLS`` cells each."""
    maps = []
    for (tower, view), group in groupby(states, lambda state: (state.ref.tower, state.ref.view)):
        chunks = list(group)
        size = -(-len(chunks) // _CELLS)
        parts = [chunks[first : first + size] for first in range(0, len(chunks), size)]
        cells = tuple(
            CoverageCell(
                first_chunk=part[0].ref.chunk,
                chunks=len(part),
                committed=sum(state.committed for state in part),
                quarantined=_quarantined(part),
            )
            for part in parts
        )
        maps.append(CoverageMap(tower=tower, view=view, chunks=len(chunks), cells=cells))
    return tuple(maps)


def _quarantined(part: Sequence[ChunkState]) -> int | None:
    counts = [None if state.quarantined is None else len(state.quarantined) for state in part]
    known = [count for count in counts if count is not None]
    return sum(known) if len(known) == len(counts) else None


def _lost(
    location: str, states: Sequence[ChunkState], reader: EmbeddingReader | None
) -> tuple[tuple[LostImage, ...], int]:
    """Return the first quarantined images, without duplicates, and the number of all."""
    quarantined: dict[int, QuarantinedRow] = {}
    if reader is not None and any(state.quarantined is None for state in states):
        quarantined = {row.row: row for row in reader.quarantined}
    for state in states:
        for row in state.quarantined or ():
            quarantined.setdefault(row.row, row)
    named = [quarantined[row] for row in sorted(quarantined)[:_LOST_NAMED]]
    if not named:
        return (), 0
    files = open_files(location)
    rows = np.array([row.row for row in named], np.int64)
    uris = TableRows(files, read_manifest(files), SAMPLES, columns=["uri"]).take(rows)["uri"].to_pylist()
    lost = tuple(
        LostImage(row=row.row, sample_id=row.sample_id, uri=uri, reason=_reason(row))
        for row, uri in zip(named, uris, strict=True)
    )
    return lost, len(quarantined)


def _reason(row: QuarantinedRow) -> str:
    return f"{row.reason}: {row.detail}" if row.detail else row.reason
