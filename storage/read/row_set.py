"""A set of row numbers as one bit for each row of the cache: a split of a billion images is 125 MB."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

_ROWS_AT_ONCE = 16_384


class RowSet:
    """A set of the rows 0 to ``total`` - 1.

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
