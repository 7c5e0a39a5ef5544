"""Rows that need no teacher, since they are known: those of an earlier cache, of a dataset that grew or changed since.

They are copied bit for bit. An image's row depends on its bytes, a caption's on its text, and both on the teacher with
its preprocessing, tokenizer and arithmetic. So they are found by content, wherever their rows are now: images that were
added move those behind them.

Rows of int8 share their scales with the others of their chunk, and in another one would be rounded a second time. Of
such a cache whole chunks are copied, of the same images or captions in the same order, and no others: what is added
behind the rest costs the teacher what is new and the last chunk before it, what is put between costs all that moves.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
import pyarrow.compute as pc
from numpy.typing import NDArray

from storage.arrays import ARRAYS
from storage.commits import ChunkRef, all_chunks
from storage.drawn_rows import stored_rows
from storage.errors import CacheMismatchError
from storage.identity import CacheIdentity
from storage.manifest import CacheManifest, Layout
from storage.reader import EmbeddingReader
from storage.tables import CAPTIONS, SAMPLES, read_table
from storage.writer import EmbeddingWriter

__all__ = ["CachedChunks", "CachedRows", "KnownRows", "NotReusableError", "known_rows", "require_reusable"]

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
    """Rows of a finished cache by the rows of another one. Holds 8 bytes for each row of the cache to fill.

    Args:
        location: of the finished cache.
        writer: of the cache to fill.

    Raises:
        NotReusableError: its rows are another teacher's, or made otherwise.
        CacheError: it cannot be read.
    """

    def __init__(self, location: str, writer: EmbeddingWriter) -> None:
        self._reader = EmbeddingReader(location, memory_bytes=_MEMORY_BYTES)
        identity = writer.manifest.identity
        require_reusable(self._reader.manifest, location, identity)
        self._views = _views_alike(self._reader, identity)
        self._old = {
            "image": _places(writer, self._reader, SAMPLES, "content_sha256"),
            "text": _places(writer, self._reader, CAPTIONS, "text"),
        }

    def take(self, ref: ChunkRef, rows: range) -> tuple[NDArray[np.bool_], dict[str, NDArray[Any]]]:
        """As :class:`KnownRows`, with the crops.

        Raises:
            CacheError: a chunk of the earlier cache cannot be read, or is damaged.
        """
        known = np.zeros(len(rows), np.bool_)
        if ref.view >= self._views:
            return known, {}
        old = self._old[ref.tower][rows.start : rows.stop]
        there = np.flatnonzero(old != _NOWHERE)
        if not len(there):
            return known, {}
        wanted, back = np.unique(old[there], return_inverse=True)
        arrays = {
            name: stored_rows(self._reader, ref.tower, wanted, ref.view, name)[back] for name in ARRAYS[ref.tower]
        }
        finite = ~np.isnan(arrays["embedding"]).any(axis=1)
        known[there[finite]] = True
        return known, {name: values[finite] for name, values in arrays.items()}

    def count(self) -> dict[str, int]:
        """Rows by tower that are copied, in view 0."""
        lost = np.fromiter(self._reader.quarantined_in(0), np.int64)
        return {
            tower: int((old != _NOWHERE).sum() - (np.isin(old, lost).sum() if tower == "image" else 0))
            for tower, old in self._old.items()
        }


class CachedChunks:
    """Whole chunks of a finished cache of int8 by the chunks of another one.

    Args:
        location: of the finished cache.
        identity, layout: of the cache to fill.
        rows_sha256: of what its chunks are made: ``EmbeddingWriter.rows_sha256``.

    Raises:
        NotReusableError, CacheError: as :class:`CachedRows`.
    """

    def __init__(
        self, location: str, identity: CacheIdentity, layout: Layout, rows_sha256: Callable[[ChunkRef], str]
    ) -> None:
        self._reader = EmbeddingReader(location, memory_bytes=_MEMORY_BYTES)
        require_reusable(self._reader.manifest, location, identity)
        self._views = _views_alike(self._reader, identity)
        self._layout = layout
        self._rows_sha256 = rows_sha256
        # one that has quarantined rows is looked at again
        self._old = {
            (ref.tower, ref.view, commit.rows_sha256): ref
            for ref, commit in self._reader.commits().items()
            if not commit.quarantined
        }

    def take(self, ref: ChunkRef, rows: range) -> tuple[NDArray[np.bool_], dict[str, NDArray[Any]]]:
        """As :class:`KnownRows`: all of a chunk as it is stored, or nothing. Raises as :meth:`CachedRows.take`."""
        old = self._find(ref)
        if old is None:
            return np.zeros(len(rows), np.bool_), {}
        return np.ones(len(rows), np.bool_), self._reader.stored_chunk(old)

    def count(self) -> dict[str, int]:
        """Rows by tower that are copied, in view 0."""
        found = Counter({"image": 0, "text": 0})
        for ref in all_chunks(self._layout):
            if ref.view == 0 and self._find(ref) is not None:
                found[ref.tower] += len(ref.rows(self._layout))
        return dict(found)

    def _find(self, ref: ChunkRef) -> ChunkRef | None:
        if ref.view >= self._views:
            return None
        return self._old.get((ref.tower, ref.view, self._rows_sha256(ref)))


def known_rows(reuse: str | None, writer: EmbeddingWriter) -> CachedRows | CachedChunks | None:
    """The rows of the cache ``reuse``, if one is named, for the cache of ``writer``; see :class:`CachedRows`.

    Raises:
        NotReusableError, CacheError: as :class:`CachedRows`.
    """
    if not reuse:
        return None
    manifest = writer.manifest
    if manifest.identity.targets.dtype == "int8":
        return CachedChunks(reuse, manifest.identity, manifest.layout, writer.rows_sha256)
    return CachedRows(reuse, writer)


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
        mine.require(like, location, "Its rows cannot be reused: leave --reuse out, and the teacher encodes all rows.")
    except CacheMismatchError as error:
        raise NotReusableError(str(error)) from None


def _views_alike(have: EmbeddingReader, identity: CacheIdentity) -> int:
    """How many views of a cache another one draws in the same way."""
    alike = {"count": 0}
    views = have.manifest.identity.views.model_copy(update=alike)
    # crops are drawn from the settings and the bytes of an image; the evaluation crop is view 0 of all
    return have.views if views == identity.views.model_copy(update=alike) else 1


def _places(wanted: EmbeddingWriter, there: EmbeddingReader, table: str, column: str) -> NDArray[np.int64]:
    """Where each value of a column of one cache is first among those of another one; -1 where it is not."""
    # both columns are let go of afterwards: what is kept of a row is its place
    values, among = (read_table(of.files, of.manifest, table, [column])[column] for of in (wanted, there))
    found = pc.index_in(values, value_set=among.combine_chunks())
    places: NDArray[np.int64] = pc.fill_null(found, _NOWHERE).to_numpy().astype(np.int64)
    return places
