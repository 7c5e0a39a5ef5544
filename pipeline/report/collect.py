"""Everything that a report shows of a cache, collected as plain data. No torch.

Embeddings are read once (``teacher_cache.storage.look.stats.read_drawn``): statistics, recall, map and pairs are of
the same rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from itertools import groupby

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

__all__ = ["collect_report"]

_CELLS = 400
_PAIRS = 12  # each way
_LOST_NAMED = 200
_MAP_SIDE, _PAIR_SIDE = 80, 224  # pixels; pictures of pairs are few and are looked at

Progress = Callable[[str, int, int], None]


def collect_report(
    location: str,
    runs: Sequence[str] = (),
    deployed: Sequence[str] = (),
    *,
    image_root: str | None = None,
    split: str | None = None,
    most: int = 20_000,
    map_images: int = 2_000,
    pictures: bool = True,
    seed: int = 0,
    progress: Progress | None = None,
) -> ReportData:
    """Read a cache, the runs that learned from it and students deployed from those.

    Of a cache that is not sealed there are no statistics, map, pairs and pictures; a note says what to do.

    Args:
        runs, deployed: folders.
        image_root: where the images are now, if not where the cache found them.
        split: images of one split, or of all, for statistics, map and pairs.
        most: images that are read; of more, so many are drawn.
        map_images: images on the map, at most; 0: no map.
        pictures: whether to read those of the images that are shown.
        seed: of what is drawn.
        progress: called with (stage, done, total).

    Raises:
        UsageError: no such split, a folder that is no run, or one that is no deployed student.
        CacheError: the cache is missing, damaged or cannot be read.
        ModuleNotFoundError: scikit-learn is not installed.
    """
    info = describe_cache(location)
    notes: list[str] = []
    # folders first: a wrong name is found before the minutes that the rest takes
    run_reports, said = read_runs(runs, info.manifest_digest)
    notes += said
    tables, said = read_deployments(deployed, info.manifest_digest)
    notes += said
    states = chunk_states(location)
    try:
        reader = EmbeddingReader(location)
    except CacheIncompleteError as error:
        notes.insert(0, f"No statistics, map and pairs yet: {error}")
        reader = None
    stats: CacheStats | None = None
    recall: SampledRecall | None = None
    on_map: RowMap | None = None
    hardest: tuple[RetrievedPair, ...] = ()
    best: tuple[RetrievedPair, ...] = ()
    pairs_of = 0
    if reader is not None:
        drawn = read_drawn(location, split, most=most, seed=seed, progress=progress)
        stats, ranked = stats_of(drawn, progress=progress), rank_rows(drawn, progress=progress)
        if ranked is not None:
            recall = ranked.recall
            hardest, best, pairs_of = retrieved_pairs(reader, ranked, _PAIRS)
        if map_images:
            if progress is not None:
                progress("map", 0, 1)
            on_map = row_map(reader, drawn.usable, map_images, seed, captions=not stats.without_caption)
            if progress is not None:
                progress("map", 1, 1)
        notes += _notes(stats, recall.images if recall else None, on_map)
    lost, lost_of = _lost(location, states, reader)
    if lost_of > len(lost):
        notes.append(f"The first {len(lost):,} of {lost_of:,} quarantined images are named; commits/image has all.")
    shown: dict[int, str] = {}
    if reader is not None and pictures:
        sides = dict.fromkeys(_rows_of_pairs(hardest + best), _PAIR_SIDE)
        sides |= {image.row: _PAIR_SIDE for image in lost}
        for alike in stats.nearest_pairs if stats is not None else ():
            sides |= dict.fromkeys(alike.rows, _PAIR_SIDE)
        for point in on_map.points if on_map is not None else ():
            sides.setdefault(point.image_row, _MAP_SIDE)
        images = CachedImages(reader, ImageSource(image_root or reader.manifest.source.image_root), sides)
        stage = None if progress is None else lambda done, total: progress("pictures", done, total)
        shown, missing = collect_pictures(images, sides, {image.row for image in lost}, stage)
        notes += [missing] if missing else []
    return ReportData(
        location=location,
        made=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        version=version("teacher-cache"),
        info=info.model_copy(update={"location": as_utf8(location)}),
        coverage=_coverage(states),
        stats=stats and stats.model_copy(update={"location": as_utf8(location)}),
        recall=recall,
        row_map=on_map,
        hardest=hardest,
        best=best,
        pairs_of=pairs_of,
        lost=lost,
        runs=run_reports,
        deployments=tables,
        pictures=shown,
        notes=tuple(notes),
    )


def _notes(stats: CacheStats, ranked: int | None, on_map: RowMap | None) -> list[str]:
    """What was drawn and left out."""
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
    """A map of each view, and of the captions; a cell is as many chunks as make at most so many cells."""
    maps = []
    for (tower, view), group in groupby(states, lambda state: (state.ref.tower, state.ref.view)):
        here = list(group)
        size = -(-len(here) // _CELLS)
        parts = [here[first : first + size] for first in range(0, len(here), size)]
        cells = tuple(
            CoverageCell(
                first_chunk=part[0].ref.chunk,
                chunks=len(part),
                committed=sum(state.committed for state in part),
                quarantined=_quarantined(part),
            )
            for part in parts
        )
        maps.append(CoverageMap(tower=tower, view=view, chunks=len(here), cells=cells))
    return tuple(maps)


def _quarantined(part: Sequence[ChunkState]) -> int | None:
    counts = [None if state.quarantined is None else len(state.quarantined) for state in part]
    known = [count for count in counts if count is not None]
    return sum(known) if len(known) == len(counts) else None


def _lost(
    location: str, states: Sequence[ChunkState], reader: EmbeddingReader | None
) -> tuple[tuple[LostImage, ...], int]:
    """The first quarantined images, each once, and how many there are."""
    found: dict[int, QuarantinedRow] = {}
    if reader is not None and any(state.quarantined is None for state in states):
        found = {row.row: row for row in reader.quarantined}  # whoever reads embeddings reads all commits
    for state in states:
        for row in state.quarantined or ():
            found.setdefault(row.row, row)
    named = [found[row] for row in sorted(found)[:_LOST_NAMED]]
    if not named:
        return (), 0
    files = open_files(location)
    rows = np.array([row.row for row in named], np.int64)
    uris = TableRows(files, read_manifest(files), SAMPLES, columns=["uri"]).take(rows)["uri"].to_pylist()
    lost = tuple(
        LostImage(row=row.row, sample_id=row.sample_id, uri=uri, reason=_reason(row))
        for row, uri in zip(named, uris, strict=True)
    )
    return lost, len(found)


def _reason(row: QuarantinedRow) -> str:
    return f"{row.reason}: {row.detail}" if row.detail else row.reason
