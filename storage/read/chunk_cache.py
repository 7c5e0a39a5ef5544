"""What belongs to the rows of a cache, made for a chunk of them at a time: none of it for all rows at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

__all__ = ["ByChunk"]

_Made = TypeVar("_Made")


class ByChunk(Generic[_Made]):
    """Makes something for each chunk when one of its rows is asked for; that of the chunks used last stays.

    For the order of :func:`teacher_cache.storage.read.shuffle.window_order`, which goes through a few chunks before it
    comes to others.

    Args:
        chunk_rows: rows that come together.
        kept: chunks of which it stays for the next call; all those of one call do.
        make: gives it, by the chunk's number.
    """

    def __init__(self, chunk_rows: int, kept: int, make: Callable[[int], _Made]) -> None:
        self._chunk_rows, self._most, self._make = chunk_rows, kept, make
        self._kept: dict[int, _Made] = {}

    def of(self, rows: NDArray[np.int64]) -> list[tuple[int, _Made, NDArray[np.intp]]]:
        """For each chunk of some of ``rows``: its first row, what was made for it, and where in ``rows`` its rows are.

        Raises:
            As ``make``; what was made before stays.
        """
        chunks = rows // self._chunk_rows
        by_chunk = np.argsort(chunks, kind="stable")
        used, starts = np.unique(chunks[by_chunk], return_index=True)
        found = []
        for chunk, start, stop in zip(used.tolist(), starts, [*starts[1:], len(rows)], strict=False):
            # last in, as the one that was used last
            made = self._kept.pop(chunk) if chunk in self._kept else self._make(chunk)
            self._kept[chunk] = made
            found.append((chunk * self._chunk_rows, made, by_chunk[start:stop]))
        for chunk in list(self._kept)[: max(0, len(self._kept) - max(self._most, len(used)))]:
            del self._kept[chunk]
        return found
