"""Rows that need no teacher, since they are known: those of an earlier cache, of a dataset that grew or changed since.

They are copied bit for bit. An image's row depends on its bytes, a caption's on its text, and both on the teacher with
its preprocessing, tokenizer and arithmetic. So they are found by content, wherever their rows are now: images that were
added move those behind them.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from storage.arrays import ARRAYS
from storage.commits import ChunkRef
from storage.drawn_rows import stored_rows
from storage.errors import CacheMismatchError
from storage.identity import CacheIdentity
from storage.manifest import CacheManifest
from storage.reader import EmbeddingReader

__all__ = ["CachedRows", "KnownRows", "NotReusableError", "known_rows", "require_reusable"]

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
            where the crop is known. A row that would be quarantined is not known.
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
        alike = {"count": 0}
        views = self._reader.manifest.identity.views.model_copy(update=alike)
        # crops are drawn from the settings and the bytes of an image; the evaluation crop is view 0 of all
        self._views = self._reader.views if views == identity.views.model_copy(update=alike) else 1
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


def known_rows(reuse: str | None, identity: CacheIdentity, samples: pa.Table, captions: pa.Table) -> CachedRows | None:
    """The rows of the cache ``reuse``, if one is named; see :class:`CachedRows`."""
    return CachedRows(reuse, identity, samples, captions) if reuse else None


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


def _places(wanted: pa.ChunkedArray, there: pa.ChunkedArray) -> NDArray[np.int64]:
    """Where each value is first among others; -1 where it is not."""
    found = pc.index_in(wanted, value_set=there.combine_chunks())
    places: NDArray[np.int64] = pc.fill_null(found, _NOWHERE).to_numpy().astype(np.int64)
    return places
