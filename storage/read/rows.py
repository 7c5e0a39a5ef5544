"""Row numbers: sets of them, as one bit for each row of the cache, and the chunk that holds each row."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from teacher_cache.storage.format.commits import ChunkRef
from teacher_cache.storage.format.layout import Tower

_ROWS_AT_ONCE = 16_384


class RowSet:
    """A set of the rows 0 to ``total`` - 1: of a billion images it takes 125 MB.

    Args:
        total: Number of rows of the cache.
        full: Whether the set begins with all rows, or with none.
    """

    def __init__(self, total: int, full: bool = False) -> None:
        self.total = total
        self._bits = np.full(-(-total // 8), 0xFF if full else 0, np.uint8)
        if full and total % 8:
            self._bits[-1] = (1 << total % 8) - 1
        self._count: int | None = None

    @classmethod
    def of(cls, rows: NDArray[np.int64] | RowSet) -> RowSet:
        """Return the set of some row numbers, in any order; a set is returned as it is."""
        if isinstance(rows, RowSet):
            return rows
        result = cls(int(rows.max()) + 1 if len(rows) else 0)
        for start in range(0, len(rows), _ROWS_AT_ONCE):
            part = rows[start : start + _ROWS_AT_ONCE]
            np.bitwise_or.at(result._bits, part >> 3, np.left_shift(1, part & 7).astype(np.uint8))
        return result

    def add(self, start: int, mask: NDArray[np.bool_]) -> None:
        """Add the rows from ``start`` on where ``mask`` is true.

        Raises:
            IndexError: The mask reaches beyond the last row.
        """
        if start + len(mask) > self.total:
            raise IndexError(f"rows are 0 to {self.total - 1}, a mask reaches to {start + len(mask) - 1}")
        bits = np.packbits(np.concatenate([np.zeros(start % 8, bool), mask]), bitorder="little")
        self._bits[start // 8 : start // 8 + len(bits)] |= bits
        self._count = None

    def remove(self, row: int) -> None:
        """Remove a row."""
        self._bits[row >> 3] &= np.uint8(0xFF ^ (1 << (row & 7)))
        self._count = None

    def __len__(self) -> int:
        if self._count is None:
            self._count = int(np.bitwise_count(self._bits).sum(dtype=np.int64))
        return self._count

    def numbers(self, start: int = 0, stop: int | None = None) -> NDArray[np.int64]:
        """Return the rows of the set from ``start`` to before ``stop`` as int64, ascending."""
        stop = self.total if stop is None else min(stop, self.total)
        first = start // 8
        bits = np.unpackbits(self._bits[first : -(-stop // 8)], bitorder="little")
        return np.flatnonzero(bits[start - first * 8 : stop - first * 8]) + start

    def parts(self, at_once: int = _ROWS_AT_ONCE) -> Iterator[NDArray[np.int64]]:
        """Yield :meth:`numbers` of all rows, in parts of ``at_once`` rows of the cache."""
        for start in range(0, self.total, at_once):
            yield self.numbers(start, start + at_once)

    def chunks(self, chunk_rows: int) -> NDArray[np.int64]:
        """Return the chunks that hold a row of the set, ascending."""
        at_once = max(1, _ROWS_AT_ONCE // chunk_rows) * chunk_rows
        parts = [np.unique(rows // chunk_rows) for rows in self.parts(at_once)]
        return np.concatenate([np.empty(0, np.int64), *parts])


@dataclass(frozen=True)
class RowPlaces:
    """Rows of one tower and the chunks that hold them. Chunks are numbered view after view.

    Attributes:
        location: Cache, for messages.
        total: Rows of one view.
        chunk_rows: Rows of a whole chunk.
        chunks: Chunks of one view.
        views: Views that can be read; 1 for texts.
        firsts, shifts: Of several parts read as one: the first row of each, and what its rows are moved by, (parts,).
    """

    location: str
    tower: Tower
    total: int
    chunk_rows: int
    chunks: int
    views: int
    firsts: NDArray[np.int64] | None = field(default=None, compare=False)
    shifts: NDArray[np.int64] | None = field(default=None, compare=False)

    def check(
        self, rows: NDArray[np.int64], view: int | NDArray[np.int64] = 0
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return rows and views as int64 arrays; views have the shape () or the shape of the rows.

        Raises:
            ValueError: The number of views is neither 1 nor the number of rows.
            IndexError: A row or view does not exist.
        """
        rows, views = np.asarray(rows, np.int64), np.asarray(view, np.int64)
        if views.shape not in ((), rows.shape):
            raise ValueError(f"{len(rows)} rows and views of shape {views.shape}: give one view, or one for each row")
        for name, values, stop in (("row", rows, self.total), ("view", views, self.views)):
            # one pass: as unsigned numbers, negative ones are large
            if values.size and values.view(np.uint64).max() >= stop:
                outside = values[(values < 0) | (values >= stop)].reshape(-1)[0]
                raise IndexError(
                    f"{self.location}: {self.tower} {name} {outside} asked for, {name}s are 0 to {stop - 1}"
                )
        return rows, views

    def at(self, rows: NDArray[np.int64], views: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the places of rows, counted over the rows of all chunks of all views, padding included."""
        if self.firsts is not None and self.shifts is not None:
            rows = rows + self.shifts[np.searchsorted(self.firsts, rows, side="right") - 1]
        return views * (self.chunks * self.chunk_rows) + rows if views.any() else rows

    def ref(self, number: int) -> ChunkRef:
        """Return the chunk with this number."""
        return ChunkRef(self.tower, *divmod(number, self.chunks))

    def number(self, ref: ChunkRef) -> int:
        """Return the number of a chunk."""
        return ref.view * self.chunks + ref.chunk

    def distinct(self, numbers: NDArray[np.int64]) -> list[int]:
        """Return each chunk number once, ascending."""
        used = np.zeros(self.views * self.chunks, bool)
        used[numbers] = True
        return np.flatnonzero(used).tolist()

    def by_chunk(self, at: NDArray[np.int64]) -> Iterator[tuple[ChunkRef, NDArray[np.intp]]]:
        """Yield each chunk that holds some of the places, with their positions in ``at``."""
        if not len(at):
            return
        numbers = at // self.chunk_rows
        if numbers.max() < 2**16:  # numpy sorts these by counting
            numbers = numbers.astype(np.uint16)
        order = np.argsort(numbers, kind="stable")
        for positions in np.split(order, np.flatnonzero(np.diff(numbers[order])) + 1):
            yield self.ref(int(numbers[positions[0]])), positions
