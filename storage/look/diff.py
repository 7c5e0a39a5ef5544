"""Two caches compared: identity field by field, images by sample_id, and how far the embeddings have moved."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from pydantic import BaseModel, Field

from teacher_cache.storage.errors import CacheIncompleteError, UsageError
from teacher_cache.storage.files.location import open_files
from teacher_cache.storage.format.layout import Tower
from teacher_cache.storage.format.manifest import CacheManifest
from teacher_cache.storage.format.manifest_file import read_manifest
from teacher_cache.storage.format.tables import CAPTIONS, SAMPLES, long_texts, read_table
from teacher_cache.storage.look.nearest import unit_rows
from teacher_cache.storage.look.sampling import draw_rows
from teacher_cache.storage.look.stats import Distribution
from teacher_cache.storage.read.reader import EmbeddingReader

__all__ = ["CacheDiff", "Drift", "DriftedRow", "FieldDifference", "RowChange", "diff_caches"]

_NAMED = 20
_MEMORY_BYTES = 64 << 20  # of a block of rows each chunk is read once
_BLOCK_ROWS = 8_192  # held in float64 of both caches: 0.2 GB at a width of 1,024
_NAMES = (("teacher", "name"), ("teacher", "pretrained"), ("dataset", "kind"))

Progress = Callable[[str, int, int], None]
_Rows = NDArray[np.int64]


class FieldDifference(BaseModel, frozen=True):
    """One field with another value."""

    field: str
    a: str
    b: str


class RowChange(BaseModel, frozen=True):
    """An image of both caches that is not the same in both."""

    sample_id: str
    row_a: int
    row_b: int
    what: tuple[str, ...] = Field(description="content, split or captions.")


class DriftedRow(BaseModel, frozen=True):
    """A row of both caches, and the cosine of its two embeddings."""

    row_a: int
    row_b: int
    sample_id: str
    cosine: float


class Drift(BaseModel, frozen=True):
    """How far embeddings have moved, of rows made of the same image or the same caption."""

    compared: int
    equal: int = Field(description="Bit for bit.")
    cosine: Distribution | None
    worst: tuple[DriftedRow, ...]


class CacheDiff(BaseModel, frozen=True):
    """The answer of ``teacher-cache diff``: what of cache ``a`` is otherwise in cache ``b``."""

    a: str
    b: str
    same: bool = Field(description="Nothing here differs, and neither does a byte of any chunk.")
    differs: bool = Field(description="Something does. Neither this nor same: as far as it was compared, nothing does.")
    manifest_a: str
    manifest_b: str
    identity: tuple[FieldDifference, ...] = Field(description="Fields that make two caches different ones.")
    names: tuple[FieldDifference, ...] = Field(description="Names of teacher and kind of dataset; these may differ.")
    layout: tuple[FieldDifference, ...] = Field(description="Shapes of chunks and the like.")
    images_added: int = Field(description="Their sample_id is in b only.")
    images_removed: int = Field(description="In a only.")
    images_changed: int
    images_moved: int = Field(description="In both, as another row.")
    images_in_one: int = Field(description="In both, but only one has an embedding of the view.")
    added: tuple[str, ...] = Field(description="The first sample_ids.")
    removed: tuple[str, ...]
    changed: tuple[RowChange, ...]
    images: Drift | None
    captions: Drift | None
    other_chunks: int | None = Field(
        description="Chunks of other bytes by their commit records: all views, norms and crops. None where rows moved, "
        "the layout is another, or a cache is not finished."
    )
    sampled: bool = Field(description="Not all rows that both have were compared.")
    not_compared: str | None = Field(description="Why no embeddings were compared.")


def diff_caches(
    a: str, b: str, view: int = 0, most: int = 20_000, seed: int = 0, progress: Progress | None = None
) -> CacheDiff:
    """Compare two caches; embeddings only where both can be read and are of one width. Without, they are not the same.

    Args:
        view: of the images whose embeddings are compared.
        most: images whose embeddings are compared, with their captions; of more, so many are drawn.
        progress: called with (stage, done, total).

    Raises:
        UsageError: neither has such a view.
        CacheError: one of them cannot be read.
    """
    first, second = _Side(a), _Side(b)
    views = max(side.manifest.layout.views for side in (first, second))
    if not 0 <= view < views:
        raise UsageError(f"neither {a} nor {b} has a view {view}; views 0 to {views - 1} can be compared")
    identity = tuple(
        FieldDifference(field=each.field, a=each.found, b=each.wanted)
        for each in first.manifest.identity.differences(second.manifest.identity)
    )
    row_b = first.rows_in(second)
    common = np.flatnonzero(row_b >= 0)
    ids = first.samples["sample_id"]
    added = np.setdiff1d(np.arange(second.samples.num_rows), row_b[common])
    changes = _changes(first, second, common, row_b[common])
    changed = np.flatnonzero(np.any(list(changes.values()), axis=0))
    found = _compare(first, second, common, row_b[common], changes, view, most, seed, progress)
    layout = _fields(first.manifest.layout.fields(), second.manifest.layout.fields())
    moved = int((row_b[common] != common).sum())
    chunks = None if layout or moved or len(added) or len(common) < len(row_b) else found.other_chunks
    differs = [
        len(identity),
        len(layout),
        len(added),
        int((row_b < 0).sum()),
        len(changed),
        found.images_in_one,
        chunks,
    ]
    differs += [drift.compared - drift.equal for drift in (found.images, found.captions) if drift is not None]
    other = any(differs) or first.manifest.sealed != second.manifest.sealed
    return CacheDiff(
        a=a,
        b=b,
        same=not other and found.reason is None and chunks == 0,
        differs=other,
        manifest_a=first.manifest.digest,
        manifest_b=second.manifest.digest,
        identity=identity,
        names=_names(first.manifest, second.manifest),
        layout=layout,
        images_added=len(added),
        images_removed=int((row_b < 0).sum()),
        images_changed=len(changed),
        images_moved=moved,
        images_in_one=found.images_in_one,
        added=tuple(second.samples["sample_id"].take(added[:_NAMED]).to_pylist()),
        removed=tuple(ids.take(np.flatnonzero(row_b < 0)[:_NAMED]).to_pylist()),
        changed=tuple(
            RowChange(
                sample_id=ids[int(common[at])].as_py(),
                row_a=int(common[at]),
                row_b=int(row_b[common[at]]),
                what=tuple(name for name, where in changes.items() if where[at]),
            )
            for at in changed[:_NAMED]
        ),
        images=found.images,
        captions=found.captions,
        other_chunks=chunks,
        sampled=found.sampled,
        not_compared=found.reason,
    )


class _Side:
    """One of the two, with its tables."""

    def __init__(self, location: str) -> None:
        self.location = location
        files = open_files(location)
        self.manifest = read_manifest(files)
        self.samples = read_table(files, self.manifest, SAMPLES, ["sample_id", "content_sha256", "split"])
        self.captions = read_table(files, self.manifest, CAPTIONS, ["image_row", "text"])
        edges = np.arange(self.manifest.layout.image_rows + 1)
        self.offsets = np.searchsorted(self.captions["image_row"].to_numpy(), edges, side="left").astype(np.int64)

    def rows_in(self, other: _Side) -> _Rows:
        """Return for each row the other cache's row of the same sample_id, -1 where it has none."""
        found = pc.index_in(self.samples["sample_id"], value_set=other.samples["sample_id"].combine_chunks())
        return np.asarray(pc.fill_null(found, -1).to_numpy(zero_copy_only=False), np.int64)

    def caption_rows(self, rows: _Rows) -> tuple[_Rows, _Rows]:
        """Return all captions of some images, and the place of each one's image among ``rows``."""
        starts = self.offsets[rows]
        counts = self.offsets[rows + 1] - starts
        within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        return np.repeat(starts, counts) + within, np.repeat(np.arange(len(rows)), counts)


def _changes(a: _Side, b: _Side, rows_a: _Rows, rows_b: _Rows) -> dict[str, NDArray[np.bool_]]:
    """Return for each image of both caches what is not the same."""
    changes = {}
    for name, column in (("content", "content_sha256"), ("split", "split")):
        equal = pc.equal(a.samples[column].take(rows_a), b.samples[column].take(rows_b))
        changes[name] = ~np.asarray(equal.to_numpy(zero_copy_only=False), bool)
    counts_a, counts_b = np.diff(a.offsets)[rows_a], np.diff(b.offsets)[rows_b]
    captions = counts_a != counts_b
    alike = np.flatnonzero(~captions)
    text_a, place = a.caption_rows(rows_a[alike])
    text_b, _ = b.caption_rows(rows_b[alike])
    texts_a, texts_b = (long_texts(side.captions["text"]) for side in (a, b))
    equal = pc.equal(texts_a.take(text_a), texts_b.take(text_b))
    captions[alike[place[~np.asarray(equal.to_numpy(zero_copy_only=False), bool)]]] = True
    changes["captions"] = captions
    return changes


@dataclass(frozen=True)
class _Compared:
    """The comparison of the rows of both; without drift, the reason."""

    images: Drift | None = None
    captions: Drift | None = None
    sampled: bool = False
    images_in_one: int = 0
    other_chunks: int | None = None
    reason: str | None = None


def _compare(
    a: _Side,
    b: _Side,
    rows_a: _Rows,
    rows_b: _Rows,
    changes: dict[str, NDArray[np.bool_]],
    view: int,
    most: int,
    seed: int,
    progress: Progress | None,
) -> _Compared:
    widths = a.manifest.layout.embed_dim, b.manifest.layout.embed_dim
    if widths[0] != widths[1]:
        return _Compared(reason=f"the embeddings are {widths[0]} and {widths[1]} wide")
    try:
        reader_a, reader_b = (EmbeddingReader(side.location, memory_bytes=_MEMORY_BYTES) for side in (a, b))
    except CacheIncompleteError as error:
        return _Compared(reason=str(error))
    if view >= min(reader_a.views, reader_b.views):
        return _Compared(reason=f"there is no view {view} in both: {reader_a.views} and {reader_b.views} views")
    commits_a, commits_b = reader_a.commits(), reader_b.commits()
    shared = commits_a.keys() & commits_b.keys()
    other_chunks = len(commits_a.keys() ^ commits_b.keys())
    other_chunks += sum(commits_a[ref].objects != commits_b[ref].objects for ref in shared)
    lost_a, lost_b = (np.array(list(reader.quarantined_in(view)), np.int64) for reader in (reader_a, reader_b))
    there_a, there_b = ~np.isin(rows_a, lost_a), ~np.isin(rows_b, lost_b)
    in_one = int((there_a != there_b).sum())
    usable = ~changes["content"] & there_a & there_b
    if not usable.any():
        reason = f"no image of the same sample_id and bytes has an embedding of view {view} in both"
        return _Compared(images_in_one=in_one, other_chunks=other_chunks, reason=reason)
    same_a = rows_a[usable]
    drawn = draw_rows(same_a, a.manifest.layout.image_chunk_rows, most, seed)
    number_b = np.full(a.manifest.layout.image_rows, -1, np.int64)
    number_b[rows_a] = rows_b
    ids = a.samples["sample_id"]
    images = _drift(reader_a, reader_b, "image", drawn, number_b[drawn], view, ids, drawn)
    if progress is not None:
        progress("compare", 1, 2)
    same_captions = np.setdiff1d(drawn, rows_a[changes["captions"]])
    text_a, place = a.caption_rows(same_captions)
    text_b, _ = b.caption_rows(number_b[same_captions])
    captions = _drift(reader_a, reader_b, "text", text_a, text_b, 0, ids, same_captions[place])
    if progress is not None:
        progress("compare", 2, 2)
    return _Compared(images, captions, len(drawn) < len(same_a), in_one, other_chunks)


def _drift(
    a: EmbeddingReader,
    b: EmbeddingReader,
    tower: Tower,
    rows_a: _Rows,
    rows_b: _Rows,
    view: int,
    ids: pa.ChunkedArray,
    owners: _Rows,
) -> Drift:
    """Compare pairs of rows; ``owners`` are the rows of their images in ``a``, whose names ``ids`` has."""
    cosines, equal = np.empty(len(rows_a)), np.empty(len(rows_a), bool)
    for start in range(0, len(rows_a), _BLOCK_ROWS):
        part = slice(start, start + _BLOCK_ROWS)
        left, right = a.take(tower, rows_a[part], view), b.take(tower, rows_b[part], view)
        cosines[part] = np.einsum("nd,nd->n", unit_rows(left).astype(np.float64), unit_rows(right).astype(np.float64))
        equal[part] = (left == right).all(axis=1)
    cosines[equal] = 1.0
    worst = np.lexsort((rows_a, cosines))[:_NAMED]
    return Drift(
        compared=len(rows_a),
        equal=int(equal.sum()),
        cosine=Distribution.of(cosines),
        worst=tuple(
            DriftedRow(
                row_a=int(rows_a[at]),
                row_b=int(rows_b[at]),
                sample_id=ids[int(owners[at])].as_py(),
                cosine=float(cosines[at]),
            )
            for at in worst
            if not equal[at]
        ),
    )


def _names(a: CacheManifest, b: CacheManifest) -> tuple[FieldDifference, ...]:
    here, there = a.identity.fields(), b.identity.fields()
    pairs = {f"{part}.{name}": (here[part].get(name), there[part].get(name)) for part, name in _NAMES}
    return tuple(
        FieldDifference(field=field, a=json.dumps(left), b=json.dumps(right))
        for field, (left, right) in pairs.items()
        if left != right
    )


def _fields(a: dict[str, Any], b: dict[str, Any]) -> tuple[FieldDifference, ...]:
    return tuple(
        FieldDifference(field=name, a=json.dumps(a.get(name)), b=json.dumps(b.get(name)))
        for name in {**a, **b}
        if a.get(name) != b.get(name)
    )
