"""Which captions are an image's, in about a byte for each image."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from storage.errors import CacheCorruptError

__all__ = ["CaptionIndex"]

_BLOCK = 64
_ROWS_AT_ONCE = 16_384


class CaptionIndex:
    """How many captions each image has, and the first caption's row of every 64th image.

    Args:
        images: that there are.
        owners: the ``image_row`` column of the captions table, in parts.
        where: the table, for messages.

    Raises:
        CacheCorruptError: the captions of an image are not side by side, in the order of the images.
    """

    def __init__(self, images: int, owners: Iterable[NDArray[np.int64]], where: str) -> None:
        # one more, so that the row behind the last image has a first caption too
        self._images, self._counts = images, np.zeros(images + _BLOCK - images % _BLOCK, np.uint8)
        last = 0
        for rows in owners:
            if not len(rows):
                continue
            if rows[0] < last or rows[-1] >= images or (rows[1:] < rows[:-1]).any():
                raise CacheCorruptError(f"{where}: not sorted by image row from 0 to {images - 1}")
            first, last = int(rows[0]), int(rows[-1])
            self._add(first, np.bincount(rows - first))
        sums = self._counts.reshape(-1, _BLOCK).sum(axis=1, dtype=np.int64)
        self._firsts = np.concatenate([[0], np.cumsum(sums)[:-1]])

    def _add(self, first: int, more: NDArray[np.int64]) -> None:
        here = slice(first, first + len(more))
        counts = self._counts[here] + more
        wanted = np.min_scalar_type(int(counts.max()))
        if wanted.itemsize > self._counts.dtype.itemsize:
            self._counts = self._counts.astype(wanted)
        self._counts[here] = counts

    def counts(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Captions of each of some images, (len(rows),) int64.

        Raises:
            IndexError: an image that there is not.
        """
        if len(rows) and not 0 <= rows.min() <= rows.max() < self._images:
            raise IndexError(f"images are 0 to {self._images - 1}, asked for {rows.min()} to {rows.max()}")
        return self._counts[rows].astype(np.int64)

    def starts(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """The first caption's row of each of some images, (len(rows),) int64; of one without, where it would be.

        Args:
            rows: also the one behind the last image.
        """
        out, blocks = np.empty(len(rows), np.int64), self._counts.reshape(-1, _BLOCK)
        for start in range(0, len(rows), _ROWS_AT_ONCE):
            some = rows[start : start + _ROWS_AT_ONCE]
            before = np.arange(_BLOCK) < (some % _BLOCK)[:, None]
            within = np.where(before, blocks[some // _BLOCK], 0).sum(axis=1, dtype=np.int64)
            out[start : start + len(some)] = self._firsts[some // _BLOCK] + within
        return out

    def captions_of(self, rows: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """All captions of some images, in their order, as rows of the cache; and each one's position in ``rows``."""
        counts = self.counts(rows)
        positions = np.repeat(np.arange(len(rows)), counts)
        within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        return np.repeat(self.starts(rows), counts) + within, positions

    def offsets(self) -> NDArray[np.int64]:
        """(images + 1,) int64: the captions of image ``i`` are rows ``offsets[i]`` to ``offsets[i + 1]``."""
        return np.concatenate([[0], np.cumsum(self._counts[: self._images], dtype=np.int64)])
