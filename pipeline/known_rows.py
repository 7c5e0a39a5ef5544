"""Rows that need no teacher, since they are known: those of an earlier cache, of a dataset that grew or changed since.

They are copied bit for bit. An image's row depends on its bytes, a caption's on its text, and both on the teacher with
its preprocessing, tokenizer and arithmetic. So they are found by content, wherever their rows are now: images that were
added move those behind them.

Rows of int8 share their scales with the others of their chunk, and in another one would be rounded a second time. Of
such a cache whole chunks are copied, of the same images or captions in the same order, and no others: what is added
behind the rest costs the teacher what is new and the last chunk before it, what is put between costs all that moves.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pipeline.scaled_jpeg import PILLOW
from storage.arrays import ARRAYS
from storage.commits import ChunkRef, Tower
from storage.drawn_rows import stored_rows
from storage.errors import CacheMismatchError
from storage.identity import CacheIdentity
from storage.manifest import CacheManifest, Layout
from storage.reader import EmbeddingReader
from storage.tables import chunk_rows_sha256
from storage.writer import EmbeddingWriter

__all__ = [
    "CachedChunks",
    "CachedRows",
    "KnownRows",
    "NotReusableError",
    "cached_rows",
    "count_known",
    "known_rows",
    "require_reusable",
]

_MEMORY_BYTES = 256 << 20
_NOWHERE = -1


class NotReusableError(CacheMismatchError):
    """A cache whose rows this teacher would not make."""


class KnownRows(Protocol):
    """Where rows of a cache come from that are not encoded."""

    def take(self, ref: ChunkRef, rows: range) -> tuple[NDArray[np.bool_], dict[str, NDArray[Any]]]:
        """Which of the rows of a chunk are known, and what is known of them.

        Returns:
            (rows,) bool; and by array name the known rows in order: ``embedding`` and ``norm``, for images ``view`` too
            where the crop is known. A row that would be quarantined is not known. With ``scale`` all rows are known,
            their embeddings int8, and all arrays there.
        """


class CachedRows:
    """Rows of a finished cache by the rows of another one.

    Args:
        location: of the finished cache.
        identity: of the cache to fill.
        samples, captions: its tables.

    Raises:
        NotReusableError: its rows are another teacher's, or made otherwise.
        CacheError: it cannot be read.
    """

    def __init__(self, location: str, identity: CacheIdentity, samples: pa.Table, captions: pa.Table) -> None:
        self._reader = EmbeddingReader(location, memory_bytes=_MEMORY_BYTES)
        require_reusable(self._reader.manifest, location, identity)
        self._views = _views_alike(self._reader, identity)
        self._old = {
            "image": _places(samples["content_sha256"], self._reader.samples["content_sha256"]),
            "text": _places(captions["text"], self._reader.captions["text"]),
        }

    def take(self, ref: ChunkRef, rows: range) -> tuple[NDArray[np.bool_], dict[str, NDArray[Any]]]:
        """As :class:`KnownRows`, with the crops.

        Raises:
            CacheError: a chunk of the earlier cache cannot be read, or is damaged.
        """
        known = np.zeros(len(rows), np.bool_)
        there = np.flatnonzero(self._there(ref, rows))
        if not len(there):
            return known, {}
        old = self._old[ref.tower][rows.start : rows.stop]
        wanted, back = np.unique(old[there], return_inverse=True)
        arrays = {
            name: stored_rows(self._reader, ref.tower, wanted, ref.view, name)[back] for name in ARRAYS[ref.tower]
        }
        finite = ~np.isnan(arrays["embedding"]).any(axis=1)
        known[there[finite]] = True
        return known, {name: values[finite] for name, values in arrays.items()}

    def count(self, ref: ChunkRef, rows: range) -> int:
        """How many rows of a chunk :meth:`take` gives; no row is read for it."""
        there = self._there(ref, rows)
        if ref.tower == "image" and there.any():
            lost = np.fromiter(self._reader.quarantined_in(ref.view), np.int64)
            there &= ~np.isin(self._old["image"][rows.start : rows.stop], lost)
        return int(there.sum())

    def _there(self, ref: ChunkRef, rows: range) -> NDArray[np.bool_]:
        """Which rows of a chunk the earlier cache has, quarantined ones included."""
        found: NDArray[np.bool_] = self._old[ref.tower][rows.start : rows.stop] != _NOWHERE
        return found & (ref.view < self._views)


class CachedChunks:
    """Whole chunks of a finished cache of int8 by the chunks of another one.

    Args:
        location: of the finished cache.
        identity: of the cache to fill.
        samples, captions: its tables.

    Raises:
        NotReusableError, CacheError: as :class:`CachedRows`.
    """

    def __init__(self, location: str, identity: CacheIdentity, samples: pa.Table, captions: pa.Table) -> None:
        self._reader = EmbeddingReader(location, memory_bytes=_MEMORY_BYTES)
        require_reusable(self._reader.manifest, location, identity)
        self._views = _views_alike(self._reader, identity)
        self._tables: dict[Tower, pa.Table] = {"image": samples, "text": captions}
        # one that has quarantined rows is looked at again
        self._old = {
            (ref.tower, ref.view, commit.rows_sha256): ref
            for ref, commit in self._reader.commits().items()
            if not commit.quarantined
        }

    def take(self, ref: ChunkRef, rows: range) -> tuple[NDArray[np.bool_], dict[str, NDArray[Any]]]:
        """As :class:`KnownRows`: all of a chunk as it is stored, or nothing. Raises as :meth:`CachedRows.take`."""
        old = self._find(ref, rows)
        if old is None:
            return np.zeros(len(rows), np.bool_), {}
        return np.ones(len(rows), np.bool_), self._reader.stored_chunk(old)

    def count(self, ref: ChunkRef, rows: range) -> int:
        """How many rows of a chunk :meth:`take` gives: all or none; no row is read for it."""
        return len(rows) if self._find(ref, rows) is not None else 0

    def _find(self, ref: ChunkRef, rows: range) -> ChunkRef | None:
        if ref.view >= self._views:
            return None
        made_of = chunk_rows_sha256(self._tables[ref.tower], ref.tower, rows)
        return self._old.get((ref.tower, ref.view, made_of))


def known_rows(reuse: str | None, writer: EmbeddingWriter) -> CachedRows | CachedChunks | None:
    """The rows of the cache ``reuse``, if one is named, for the cache of ``writer``; see :class:`CachedRows`.

    Raises:
        NotReusableError, CacheError: as :class:`CachedRows`.
    """
    if not reuse:
        return None
    return cached_rows(reuse, writer.manifest.identity, writer.samples, writer.captions)


def cached_rows(
    location: str, identity: CacheIdentity, samples: pa.Table, captions: pa.Table
) -> CachedRows | CachedChunks:
    """Of a finished cache, what one with this identity and these tables can copy: rows, or of int8 whole chunks.

    Raises:
        NotReusableError, CacheError: as :class:`CachedRows`.
    """
    kind = CachedChunks if identity.targets.dtype == "int8" else CachedRows
    return kind(location, identity, samples, captions)


def count_known(known: CachedRows | CachedChunks, layout: Layout, refs: Iterable[ChunkRef]) -> dict[Tower, int]:
    """How many rows of some chunks are copied, by tower; an image's views are rows of their own.

    Args:
        layout: of the cache to fill.
        refs: chunks of it.
    """
    found: dict[Tower, int] = {"image": 0, "text": 0}
    for ref in refs:
        found[ref.tower] += known.count(ref, ref.rows(layout))
    return found


def require_reusable(have: CacheManifest, location: str, identity: CacheIdentity) -> None:
    """Refuse a cache whose rows a teacher would not make again.

    Args:
        have: of the cache to copy from, at ``location``.
        identity: of the cache to fill.

    Raises:
        NotReusableError: teacher, preprocessing, tokenizer or what is stored differ.
    """
    mine = have.identity
    like = identity.model_copy(update={"dataset": mine.dataset, "views": mine.views})
    try:
        mine.require(like, location, f"Its rows cannot be reused: {_way_out(mine, like)}, and the teacher encodes all.")
    except CacheMismatchError as error:
        raise NotReusableError(str(error)) from None


def _way_out(have: CacheIdentity, wanted: CacheIdentity) -> str:
    """What to do where rows cannot be copied; to ask for them as they are is offered where that is all it takes."""
    flags = {"targets.dtype": f"--dtype {have.targets.dtype}"}
    if have.preprocess.decoder != wanted.preprocess.decoder:
        decoder = f"--decoder {have.preprocess.decoder or PILLOW}"
        flags |= {"preprocess.decoder": decoder, "preprocess.probe": decoder}
    fields = [each.field for each in have.differences(wanted)]
    leave_out = "leave --reuse out"
    if set(fields) <= set(flags):
        return f"ask for {' '.join(dict.fromkeys(flags[field] for field in fields))} as it has them, or {leave_out}"
    return leave_out


def _views_alike(have: EmbeddingReader, identity: CacheIdentity) -> int:
    """How many views of a cache another one draws in the same way."""
    alike = {"count": 0}
    views = have.manifest.identity.views.model_copy(update=alike)
    # crops are drawn from the settings and the bytes of an image; the evaluation crop is view 0 of all
    return have.views if views == identity.views.model_copy(update=alike) else 1


def _places(wanted: pa.ChunkedArray, there: pa.ChunkedArray) -> NDArray[np.int64]:
    """Where each value is first among others; -1 where it is not."""
    found = pc.index_in(wanted, value_set=there.combine_chunks())
    places: NDArray[np.int64] = pc.fill_null(found, _NOWHERE).to_numpy().astype(np.int64)
    return places
