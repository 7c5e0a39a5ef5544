"""Rows that are copied from an earlier cache, bit for bit, instead of encoded.

An image's row depends on its bytes, a caption's on its text, and both on the teacher with its preprocessing, tokenizer
and arithmetic. Rows are matched by content, because added images shift the row numbers.

Int8 rows share their scales within a chunk; in another chunk they would be rounded a second time. So an int8 cache
gives only whole chunks, of the same images or captions in the same order. After rows are appended, the teacher encodes
them and the last old chunk; after rows are inserted, it encodes every row that moved.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from teacher_cache.pipeline.data.images.decoders import PILLOW
from teacher_cache.storage.errors import CacheMismatchError
from teacher_cache.storage.files.protocol import CacheFiles
from teacher_cache.storage.format.commits import ChunkRef
from teacher_cache.storage.format.identity import CacheIdentity
from teacher_cache.storage.format.layout import ARRAYS, Layout, Tower
from teacher_cache.storage.format.manifest import CacheManifest
from teacher_cache.storage.format.tables import CAPTIONS, SAMPLES, chunk_rows_sha256, long_texts, read_table
from teacher_cache.storage.look.sampling import stored_rows
from teacher_cache.storage.observe.quantities import counted
from teacher_cache.storage.read.reader import EmbeddingReader
from teacher_cache.storage.write.writer import EmbeddingWriter

_MEMORY_BYTES = 256 << 20
_NOWHERE = -1


class NotReusableError(CacheMismatchError):
    """Rows of a cache that differ from what this teacher would make."""


class KnownRows(Protocol):
    """Source of rows that are not encoded."""

    def take(self, ref: ChunkRef, rows: range) -> tuple[NDArray[np.bool_], dict[str, NDArray[Any]]]:
        """Return which rows of a chunk are known, and their arrays.

        Returns:
            (rows,) bool; and the known rows by array name: ``embedding`` and ``norm``, for images also ``view`` if
            the crop is known. A row that would be quarantined is not known. With ``scale``, all rows are known and
            the embeddings are int8.
        """


class CachedRows:
    """Rows of a finished cache, matched to the rows of another one. Holds 8 bytes for each row of the cache to fill.

    Args:
        location: location of the finished cache.
        identity: identity of the cache to fill.
        column: reads a column of the cache to fill, by the names of table and column.

    Raises:
        NotReusableError: the finished cache has another teacher, preprocessing, tokenizer or dtype.
        CacheError: it cannot be read.
    """

    def __init__(self, location: str, identity: CacheIdentity, column: Callable[[str, str], pa.ChunkedArray]) -> None:
        self._reader = EmbeddingReader(location, memory_bytes=_MEMORY_BYTES)
        require_reusable(self._reader.manifest, location, identity)
        self._views = _views_alike(self._reader, identity)
        self._old = {
            "image": _places(column, self._reader, SAMPLES, "content_sha256"),
            "text": _places(column, self._reader, CAPTIONS, "text"),
        }
        self._lost: dict[int, NDArray[np.int64]] = {}

    def take(self, ref: ChunkRef, rows: range) -> tuple[NDArray[np.bool_], dict[str, NDArray[Any]]]:
        """Return known rows as :class:`KnownRows` does, with the crops.

        Raises:
            CacheError: a chunk of the earlier cache cannot be read, or is damaged.
        """
        known = np.zeros(len(rows), np.bool_)
        matched = np.flatnonzero(self._matched(ref, rows))
        if not len(matched):
            return known, {}
        old = self._old[ref.tower][rows.start : rows.stop]
        arrays = {
            name: stored_rows(self._reader, ref.tower, old[matched], ref.view, name) for name in ARRAYS[ref.tower]
        }
        finite = ~np.isnan(arrays["embedding"]).any(axis=1)
        known[matched[finite]] = True
        return known, {name: values[finite] for name, values in arrays.items()}

    def count(self, ref: ChunkRef, rows: range) -> int:
        """Return the number of rows of a chunk that :meth:`take` gives, without reading rows."""
        matched = self._matched(ref, rows)
        if ref.tower == "image" and matched.any():
            matched &= ~np.isin(self._old["image"][rows.start : rows.stop], self._lost_in(ref.view))
        return int(matched.sum())

    def _lost_in(self, view: int) -> NDArray[np.int64]:
        """Return the rows quarantined in a view. Searches all commits once."""
        if view not in self._lost:
            self._lost[view] = np.fromiter(self._reader.quarantined_in(view), np.int64)
        return self._lost[view]

    def _matched(self, ref: ChunkRef, rows: range) -> NDArray[np.bool_]:
        """Return which rows of a chunk the earlier cache has, quarantined ones included."""
        matched: NDArray[np.bool_] = self._old[ref.tower][rows.start : rows.stop] != _NOWHERE
        return matched & (ref.view < self._views)


class CachedChunks:
    """Whole chunks of a finished int8 cache, matched to the chunks of another one.

    Args:
        location: location of the finished cache.
        identity: identity of the cache to fill.
        rows_sha256: digests rows of that cache, as ``teacher_cache.storage.format.tables.chunk_rows_sha256``.

    Raises:
        NotReusableError, CacheError: as :class:`CachedRows`.
    """

    def __init__(self, location: str, identity: CacheIdentity, rows_sha256: Callable[[Tower, range], str]) -> None:
        self._reader = EmbeddingReader(location, memory_bytes=_MEMORY_BYTES)
        require_reusable(self._reader.manifest, location, identity)
        self._views = _views_alike(self._reader, identity)
        self._rows_sha256 = rows_sha256
        # chunks with quarantined rows are encoded again
        self._old = {
            (ref.tower, ref.view, commit.rows_sha256): ref
            for ref, commit in self._reader.commits().items()
            if not commit.quarantined
        }

    def take(self, ref: ChunkRef, rows: range) -> tuple[NDArray[np.bool_], dict[str, NDArray[Any]]]:
        """Return a whole chunk as stored, or nothing. Raises as :meth:`CachedRows.take`."""
        old = self._find(ref, rows)
        if old is None:
            return np.zeros(len(rows), np.bool_), {}
        return np.ones(len(rows), np.bool_), self._reader.stored_chunk(old)

    def count(self, ref: ChunkRef, rows: range) -> int:
        """Return the number of rows of a chunk that :meth:`take` gives, all or none, without reading rows."""
        return len(rows) if self._find(ref, rows) is not None else 0

    def _find(self, ref: ChunkRef, rows: range) -> ChunkRef | None:
        if ref.view >= self._views:
            return None
        return self._old.get((ref.tower, ref.view, self._rows_sha256(ref.tower, rows)))


@dataclass(frozen=True)
class DatasetChanges:
    """Images that a dataset and a cache do not share, by sample_id.

    Attributes:
        removed, changed: sample_ids of the cache's images that the dataset lacks, and that have other bytes.
    """

    kept: int
    added: int
    removed: list[str]
    changed: list[str]

    @property
    def only_added(self) -> bool:
        """True if the cache's images are all as they were, and there are more."""
        return bool(self.added) and not self.removed and not self.changed

    def described(self, more_captions: int) -> str:
        """Return the changes in words.

        Args:
            more_captions: number of captions of the dataset above that of the cache.
        """
        more = [
            counted(number, noun) for number, noun in ((self.added, "image"), (more_captions, "caption")) if number > 0
        ]
        parts = [f"{' and '.join(more)} more"] if more else []
        if more_captions < 0 and not self.removed:
            parts.append(f"{counted(-more_captions, 'caption')} less")
        for ids, what in ((self.removed, "missing"), (self.changed, "with other bytes")):
            if ids:
                parts.append(f"{counted(len(ids), 'image')} {what}, the first: {ids[0]}")
        return "; ".join(parts) or "other captions or splits, or the same ones in another order or of other kinds"


def dataset_changes(files: CacheFiles, have: CacheManifest, tables: Mapping[str, pa.Table]) -> DatasetChanges:
    """Compare the images of a cache with the tables of a dataset."""
    old, new = read_table(files, have, SAMPLES, ["sample_id", "content_sha256"]), tables[SAMPLES]
    places = pc.index_in(old["sample_id"], value_set=new["sample_id"].combine_chunks())
    copied = old.filter(pc.is_valid(places))
    other = pc.not_equal(copied["content_sha256"], new["content_sha256"].take(places.drop_null()))
    removed = old.filter(pc.is_null(places))["sample_id"].to_pylist()
    changed = copied.filter(other)["sample_id"].to_pylist()
    return DatasetChanges(len(copied), len(new) - len(copied), removed, changed)


def known_rows(reuse: str | None, writer: EmbeddingWriter) -> CachedRows | CachedChunks | None:
    """Return the rows of the cache ``reuse``, if one is named, for the cache of ``writer``; see :class:`CachedRows`.

    Raises:
        NotReusableError, CacheError: as :class:`CachedRows`.
    """
    if not reuse:
        return None
    return cached_rows(
        reuse,
        writer.manifest.identity,
        lambda table, name: read_table(writer.files, writer.manifest, table, [name])[name],
        lambda tower, rows: chunk_rows_sha256(writer.table(tower).read(rows), tower),
    )


def cached_rows(
    location: str,
    identity: CacheIdentity,
    column: Callable[[str, str], pa.ChunkedArray],
    rows_sha256: Callable[[Tower, range], str],
) -> CachedRows | CachedChunks:
    """Return the rows that another cache can copy from a finished one, or whole chunks for int8.

    Args:
        identity: identity of the cache to fill.
        column: reads a column of the cache to fill, by the names of table and column.
        rows_sha256: digests rows of that cache.

    Raises:
        NotReusableError, CacheError: as :class:`CachedRows`.
    """
    if identity.targets.dtype == "int8":
        return CachedChunks(location, identity, rows_sha256)
    return CachedRows(location, identity, column)


def count_known(known: CachedRows | CachedChunks, layout: Layout, refs: Iterable[ChunkRef]) -> dict[Tower, int]:
    """Return the number of rows of some chunks that are copied, by tower. Each view of an image counts as a row.

    Args:
        layout: layout of the cache to fill.
        refs: its chunks to count.
    """
    counts: dict[Tower, int] = {"image": 0, "text": 0}
    for ref in refs:
        counts[ref.tower] += known.count(ref, ref.rows(layout))
    return counts


def require_reusable(have: CacheManifest, location: str, identity: CacheIdentity) -> None:
    """Check that a teacher would make the rows of a cache again.

    Args:
        have: manifest of the cache to copy from, at ``location``.
        identity: identity of the cache to fill.

    Raises:
        NotReusableError: the teacher, preprocessing, tokenizer or stored dtype differs.
    """
    stored = have.identity
    like = identity.model_copy(update={"dataset": stored.dataset, "views": stored.views})
    try:
        stored.require(
            like, location, f"Its rows cannot be reused: {_way_out(stored, like)}, and the teacher encodes all."
        )
    except CacheMismatchError as error:
        raise NotReusableError(str(error)) from None


def _way_out(have: CacheIdentity, wanted: CacheIdentity) -> str:
    """Return the remedy if rows cannot be copied: flags that match the other cache if they suffice, else no --reuse."""
    flags = {"targets.dtype": f"--dtype {have.targets.dtype}"}
    if have.preprocess.decoder != wanted.preprocess.decoder:
        decoder = f"--decoder {have.preprocess.decoder or PILLOW}"
        flags |= {"preprocess.decoder": decoder, "preprocess.probe": decoder}
    fields = [difference.field for difference in have.differences(wanted)]
    leave_out = "leave --reuse out"
    if set(fields) <= set(flags):
        return f"ask for {' '.join(dict.fromkeys(flags[field] for field in fields))} as it has them, or {leave_out}"
    return leave_out


def _views_alike(have: EmbeddingReader, identity: CacheIdentity) -> int:
    """Return the number of views of a cache that another one draws in the same way."""
    alike = {"count": 0}
    views = have.manifest.identity.views.model_copy(update=alike)
    # a crop depends on the settings and the image's bytes alone; view 0 is always the evaluation crop
    return have.views if views == identity.views.model_copy(update=alike) else 1


def _places(
    column: Callable[[str, str], pa.ChunkedArray], have: EmbeddingReader, table: str, name: str
) -> NDArray[np.int64]:
    """Return the first position of each value of a column in the same column of another cache; -1 if it is missing."""
    # both columns are freed afterwards: only the positions stay in memory
    parts = [chunk for part in have.column(table, name) for chunk in long_texts(part).chunks]
    among = pa.chunked_array(parts, pa.large_string()).combine_chunks()
    positions = pc.index_in(long_texts(column(table, name)), value_set=among)
    places: NDArray[np.int64] = pc.fill_null(positions, _NOWHERE).to_numpy().astype(np.int64)
    return places
