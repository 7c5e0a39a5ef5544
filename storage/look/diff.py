"""Two caches compared: identity field by field, images by content, and how far the embeddings have moved.

An image is the same if its bytes are, as for ``precompute --reuse``: a renamed one is matched, and a file with other
bytes is matched by its sample_id only if neither cache has those bytes elsewhere. Memory: 64 bytes per image.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from operator import itemgetter
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, Field

from teacher_cache.storage.errors import CacheIncompleteError, UsageError
from teacher_cache.storage.files.location import open_files
from teacher_cache.storage.format.identity import NAMES_ONLY, CacheIdentity
from teacher_cache.storage.format.layout import Tower
from teacher_cache.storage.format.manifest_file import read_manifest
from teacher_cache.storage.format.table_rows import TableRows
from teacher_cache.storage.format.tables import CAPTIONS, SAMPLES
from teacher_cache.storage.look.nearest import paired_scores, unit_rows
from teacher_cache.storage.look.sampling import Progress, draw_rows, stage
from teacher_cache.storage.look.stats import Distribution
from teacher_cache.storage.read.caption_index import CaptionIndex
from teacher_cache.storage.read.content_index import content_digests
from teacher_cache.storage.read.reader import EmbeddingReader

_NAMED = 20
_MEMORY_BYTES = 64 << 20  # each chunk is read once per block of rows
_BLOCK_ROWS = 8_192  # in float64, of both caches: 0.2 GB at a width of 1,024

_Rows = NDArray[np.int64]


class FieldDifference(BaseModel, frozen=True):
    """One field with another value."""

    field: str
    a: str
    b: str


class RowChange(BaseModel, frozen=True):
    """An image of both caches that differs."""

    sample_id: str = Field(description="Name of the image in a.")
    row_a: int
    row_b: int
    what: tuple[str, ...] = Field(description="Parts that differ: content, split, captions.")


class DriftedRow(BaseModel, frozen=True):
    """A row of both caches, and the cosine of its two embeddings."""

    row_a: int
    row_b: int
    sample_id: str
    cosine: float


class Drift(BaseModel, frozen=True):
    """Differences of embeddings between rows of the same image or caption."""

    compared: int
    equal: int = Field(description="Rows equal bit for bit.")
    cosine: Distribution | None
    worst: tuple[DriftedRow, ...]


class CacheDiff(BaseModel, frozen=True):
    """Result of ``teacher-cache diff``: the differences between caches ``a`` and ``b``."""

    a: str
    b: str
    same: bool = Field(description="True if no field differs and all chunks are equal byte for byte.")
    differs: bool = Field(description="True if something differs. Not implied by same=False: see not_compared.")
    manifest_a: str
    manifest_b: str
    identity: tuple[FieldDifference, ...] = Field(description="Identity fields that differ.")
    names: tuple[FieldDifference, ...] = Field(description="Names of teacher and dataset that differ; not counted.")
    layout: tuple[FieldDifference, ...] = Field(description="Layout fields that differ, such as chunk shapes.")
    images_added: int = Field(description="Images in b only.")
    images_removed: int = Field(description="Images in a only.")
    images_renamed: int = Field(description="Images of both caches, with the same bytes and another sample_id.")
    images_changed: int
    images_moved: int = Field(description="Images of both caches with different rows.")
    images_in_one: int = Field(description="Images of both caches with an embedding of the view in only one.")
    added: tuple[str, ...] = Field(description="First sample_ids added.")
    removed: tuple[str, ...]
    renamed: tuple[tuple[str, str], ...] = Field(description="First images renamed, by their sample_ids in a and b.")
    changed: tuple[RowChange, ...]
    images: Drift | None
    captions: Drift | None
    other_chunks: int | None = Field(
        description="Chunks with different bytes by their commit records: all views, norms and crops. None if rows "
        "moved, the layouts differ, or a cache is not finished."
    )
    sampled: bool = Field(description="True if only a sample of the common rows was compared.")
    not_compared: str | None = Field(description="Reason why no embeddings were compared.")


def diff_caches(
    a: str, b: str, view: int = 0, most: int = 20_000, seed: int = 0, progress: Progress | None = None
) -> CacheDiff:
    """Compare two caches. ``same`` is False if embeddings cannot be compared: unfinished caches, or other widths.

    Args:
        view: view of the images to compare.
        most: maximum number of images whose embeddings are compared, with their captions. More are sampled.
        progress: called with (stage, done, total).

    Raises:
        UsageError: neither has such a view.
        CacheError: one of them cannot be read.
    """
    pair = _Pair(a, b)
    first, second = pair.a.manifest, pair.b.manifest
    views = max(first.layout.views, second.layout.views)
    if not 0 <= view < views:
        raise UsageError(f"neither {a} nor {b} has a view {view}; views 0 to {views - 1} can be compared")
    identity = tuple(
        FieldDifference(field=difference.field, a=difference.cached, b=difference.requested)
        for difference in first.identity.differences(second.identity)
    )
    layout = _fields(first.layout.fields(), second.layout.fields())
    rows = _compare(pair, view, most, seed, progress)
    moved, same_rows = int((pair.rows_b != pair.rows_a).sum()), not len(pair.added) and not len(pair.removed)
    chunks = rows.other_chunks if same_rows and not moved and not layout else None
    counts = [len(identity), len(layout), len(pair.added), len(pair.removed), len(pair.changed)]
    counts += [rows.images_in_one, chunks or 0]
    counts += [drift.compared - drift.equal for drift in (rows.images, rows.captions) if drift is not None]
    differs = any(counts) or first.sealed != second.sealed
    return CacheDiff(
        a=a,
        b=b,
        same=not differs and rows.reason is None and chunks == 0,
        differs=differs,
        manifest_a=first.digest,
        manifest_b=second.digest,
        identity=identity,
        names=_fields(_names(first.identity), _names(second.identity)),
        layout=layout,
        images_added=len(pair.added),
        images_removed=len(pair.removed),
        images_renamed=len(pair.renamed),
        images_changed=len(pair.changed),
        images_moved=moved,
        images_in_one=rows.images_in_one,
        added=pair.b.ids(pair.added[:_NAMED]),
        removed=pair.a.ids(pair.removed[:_NAMED]),
        renamed=pair.names_of(pair.renamed[:_NAMED]),
        changed=pair.named_changes(),
        images=rows.images,
        captions=rows.captions,
        other_chunks=chunks,
        sampled=rows.sampled,
        not_compared=rows.reason,
    )


class _Side:
    """One of the two caches, with a digest of each image's parts.

    Attributes:
        keys: (images,) S16 by part: sample_id, content_sha256, split and captions.
    """

    def __init__(self, location: str) -> None:
        self.location = location
        files = open_files(location)
        self.manifest = read_manifest(files)
        columns = ["sample_id", "content_sha256", "split"]
        self._samples = TableRows(files, self.manifest, SAMPLES, columns=columns)
        parts = [[content_digests(part[name].to_pylist()) for name in columns] for part in self._samples.parts()]
        self.keys = {
            name: np.concatenate(blocks) for name, blocks in zip(columns, zip(*parts, strict=True), strict=True)
        }
        captions = TableRows(files, self.manifest, CAPTIONS, columns=["image_row", "text"])
        owners = TableRows(files, self.manifest, CAPTIONS, columns=["image_row"]).parts()
        self.index = CaptionIndex(
            self.manifest.layout.image_rows, (part["image_row"].to_numpy() for part in owners), f"{location}/{CAPTIONS}"
        )
        self.keys["captions"] = _digests_of_images(captions, self.manifest.layout.image_rows)

    def ids(self, rows: _Rows) -> tuple[str, ...]:
        """Return the sample_ids of some rows."""
        return tuple(self._samples.take(rows)["sample_id"].to_pylist())


def _digests_of_images(captions: TableRows, images: int) -> NDArray[np.bytes_]:
    """Return a digest over the texts of each image, in order; empty for an image without captions."""

    def rows() -> Iterator[tuple[int, str]]:
        for part in captions.parts():
            yield from zip(part["image_row"].to_pylist(), part["text"].to_pylist(), strict=True)

    digests = np.zeros(images, "S16")
    for owner, group in groupby(rows(), itemgetter(0)):
        digests[owner] = content_digests([json.dumps([text for _, text in group])])[0]
    return digests


class _Pair:
    """Two caches, and the images that both have.

    Attributes:
        rows_a, rows_b: (n,) rows of the images in both, ascending in ``a``.
        added, removed: rows of the others, in ``b`` and in ``a``.
    """

    def __init__(self, a: str, b: str) -> None:
        self.a, self.b = _Side(a), _Side(b)
        self.row_b = _rows_in_b(self.a.keys, self.b.keys)
        self.rows_a = np.flatnonzero(self.row_b >= 0)
        self.rows_b = self.row_b[self.rows_a]
        self.added = np.setdiff1d(np.arange(self.b.manifest.layout.image_rows), self.rows_b)
        self.removed = np.flatnonzero(self.row_b < 0)

    @cached_property
    def changes(self) -> dict[str, NDArray[np.bool_]]:
        """Masks over the images in both caches: different content, split or captions."""
        parts = {"content": "content_sha256", "split": "split", "captions": "captions"}
        return {part: self._differ(key) for part, key in parts.items()}

    @property
    def changed(self) -> _Rows:
        """Positions of the images that differ."""
        return np.flatnonzero(np.any(list(self.changes.values()), axis=0))

    @cached_property
    def renamed(self) -> _Rows:
        """Positions of the images with another sample_id."""
        return np.flatnonzero(self._differ("sample_id"))

    def names_of(self, positions: _Rows) -> tuple[tuple[str, str], ...]:
        """Return the sample_ids in both caches of some images in both."""
        both = zip(self.a.ids(self.rows_a[positions]), self.b.ids(self.rows_b[positions]), strict=True)
        return tuple(both)

    def named_changes(self) -> tuple[RowChange, ...]:
        """Return the first of the changed images."""
        first = self.changed[:_NAMED]
        return tuple(
            RowChange(
                sample_id=sample_id,
                row_a=int(self.rows_a[at]),
                row_b=int(self.rows_b[at]),
                what=tuple(name for name, where in self.changes.items() if where[at]),
            )
            for at, sample_id in zip(first, self.a.ids(self.rows_a[first]), strict=True)
        )

    def _differ(self, key: str) -> NDArray[np.bool_]:
        return np.asarray(self.a.keys[key][self.rows_a] != self.b.keys[key][self.rows_b])


def _rows_in_b(a: dict[str, NDArray[np.bytes_]], b: dict[str, NDArray[np.bytes_]]) -> _Rows:
    """Return, for each row of a, its row in b: of the same name and content, else content, else name; -1 for none.

    Each row of b is that of at most one row of a.
    """
    rows = np.full(len(a["split"]), -1, np.int64)
    for names in (["content_sha256", "sample_id"], ["content_sha256"], ["sample_id"]):
        left_a, left_b = np.flatnonzero(rows < 0), np.setdiff1d(np.arange(len(b["split"])), rows)
        at_a, at_b = _matches(*(_joined(keys, names, left) for keys, left in ((a, left_a), (b, left_b))))
        rows[left_a[at_a]] = left_b[at_b]
    return rows


def _joined(keys: dict[str, NDArray[np.bytes_]], names: list[str], rows: _Rows) -> NDArray[np.bytes_]:
    digests = [keys[name][rows].view(np.uint64) for name in names]
    return np.asarray(np.bitwise_xor.reduce(digests).view("S16"))


def _matches(a: NDArray[np.bytes_], b: NDArray[np.bytes_]) -> tuple[_Rows, _Rows]:
    """Return the positions of equal values in both, in pairs: the n-th of equal values belongs to the n-th."""
    codes = np.unique(np.concatenate([a, b]), return_inverse=True)[1]
    keys_a, keys_b = (part * len(codes) + _earlier_equals(part) for part in np.split(codes, [len(a)]))
    _, at_a, at_b = np.intersect1d(keys_a, keys_b, assume_unique=True, return_indices=True)
    return at_a, at_b


def _earlier_equals(values: _Rows) -> _Rows:
    """Return, for each value, how many equal ones come before it."""
    order = np.argsort(values, kind="stable")
    numbers = np.empty(len(values), np.int64)
    numbers[order] = np.arange(len(values)) - np.searchsorted(values[order], values[order])
    return numbers


@dataclass(frozen=True)
class _Compared:
    """Comparison of the rows of both caches; without drift, the reason why."""

    images: Drift | None = None
    captions: Drift | None = None
    sampled: bool = False
    images_in_one: int = 0
    other_chunks: int | None = None
    reason: str | None = None


def _compare(pair: _Pair, view: int, most: int, seed: int, progress: Progress | None) -> _Compared:
    widths = [side.manifest.layout.embed_dim for side in (pair.a, pair.b)]
    if widths[0] != widths[1]:
        return _Compared(reason=f"the embeddings are {widths[0]} and {widths[1]} wide")
    try:
        a, b = (EmbeddingReader(side.location, memory_bytes=_MEMORY_BYTES) for side in (pair.a, pair.b))
    except CacheIncompleteError as error:
        return _Compared(reason=str(error))
    if view >= min(a.views, b.views):
        return _Compared(reason=f"there is no view {view} in both: {a.views} and {b.views} views")
    other_chunks = _other_chunks(a, b)
    has_a, has_b = (
        ~np.isin(rows, np.array(list(reader.quarantined_in(view)), np.int64))
        for rows, reader in ((pair.rows_a, a), (pair.rows_b, b))
    )
    in_one = int((has_a != has_b).sum())
    usable = ~pair.changes["content"] & has_a & has_b
    if not usable.any():
        reason = f"no image of the same bytes has an embedding of view {view} in both"
        return _Compared(images_in_one=in_one, other_chunks=other_chunks, reason=reason)
    same = pair.rows_a[usable]
    drawn = draw_rows(same, pair.a.manifest.layout.image_chunk_rows, most, seed)
    report = stage(progress, "compare")
    images = _drift(pair, (a, b), "image", view, drawn, pair.row_b[drawn], drawn)
    report(1, 2)
    same_captions = np.setdiff1d(drawn, pair.rows_a[pair.changes["captions"]])
    text_a, place = pair.a.index.captions_of(same_captions)
    text_b, _ = pair.b.index.captions_of(pair.row_b[same_captions])
    captions = _drift(pair, (a, b), "text", 0, text_a, text_b, same_captions[place])
    report(2, 2)
    return _Compared(images, captions, len(drawn) < len(same), in_one, other_chunks)


def _other_chunks(a: EmbeddingReader, b: EmbeddingReader) -> int:
    """Count the chunks whose bytes differ by the commit records."""
    commits_a, commits_b = a.commits(), b.commits()
    in_one = commits_a.keys() ^ commits_b.keys()
    shared = commits_a.keys() & commits_b.keys()
    return len(in_one) + sum(commits_a[ref].objects != commits_b[ref].objects for ref in shared)


def _drift(
    pair: _Pair,
    readers: tuple[EmbeddingReader, EmbeddingReader],
    tower: Tower,
    view: int,
    rows_a: _Rows,
    rows_b: _Rows,
    owners: _Rows,
) -> Drift:
    """Compare pairs of rows; ``owners`` are the rows of their images in ``a``."""
    cosines, equal = np.empty(len(rows_a)), np.empty(len(rows_a), bool)
    for start in range(0, len(rows_a), _BLOCK_ROWS):
        part = slice(start, start + _BLOCK_ROWS)
        in_a, in_b = (
            reader.take(tower, rows[part], view) for reader, rows in zip(readers, (rows_a, rows_b), strict=True)
        )
        cosines[part] = paired_scores(unit_rows(in_a), unit_rows(in_b))
        equal[part] = (in_a == in_b).all(axis=1)
    cosines[equal] = 1.0
    worst = np.lexsort((rows_a, cosines))[:_NAMED]
    worst = worst[~equal[worst]]
    return Drift(
        compared=len(rows_a),
        equal=int(equal.sum()),
        cosine=Distribution.of(cosines),
        worst=tuple(
            DriftedRow(row_a=int(rows_a[at]), row_b=int(rows_b[at]), sample_id=name, cosine=float(cosines[at]))
            for at, name in zip(worst, pair.a.ids(owners[worst]), strict=True)
        ),
    )


def _names(identity: CacheIdentity) -> dict[str, Any]:
    fields = identity.fields()
    return {f"{part}.{name}": fields[part].get(name) for part, name in NAMES_ONLY}


def _fields(a: dict[str, Any], b: dict[str, Any]) -> tuple[FieldDifference, ...]:
    return tuple(
        FieldDifference(field=name, a=json.dumps(a.get(name)), b=json.dumps(b.get(name)))
        for name in {**a, **b}
        if a.get(name) != b.get(name)
    )
