"""Captions of each image, in at most one byte per image; almost none if all images have the same number."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
from numpy.typing import NDArray

from teacher_cache.storage.errors import CacheCorruptError

_BLOCK = 256
_ROWS_AT_ONCE = 4096


class CaptionIndex:
    """Number of captions of each image, and the first caption's row of every 256th image.

    Args:
        images: Number of images.
        owners: ``image_row`` column of the captions table, in parts.
        where: The table, for messages.

    Raises:
        CacheCorruptError: The captions of an image are not side by side, in the order of the images.
    """

    def __init__(self, images: int, owners: Iterable[NDArray[np.int64]], where: str) -> None:
        # a single number for all images, until they differ
        self._images, start = images, 0
        # one more: the row behind the last image is valid too
        blocks = images // _BLOCK + 1
        self._counts: NDArray[np.unsignedinteger] = np.broadcast_to(np.uint8(0), (blocks, _BLOCK))
        self._firsts = np.zeros(blocks + 1, np.int64)
        for counts in _counts_in_blocks(images, owners, where):
            block, sums = start // _BLOCK, counts.reshape(-1, _BLOCK).sum(axis=1)
            self._firsts[block + 1 : block + 1 + len(sums)] = self._firsts[block] + sums.cumsum()
            self._put(start, counts[: images - start])
            start += len(counts)

    def _put(self, start: int, counts: NDArray[np.int64]) -> None:
        if not len(counts):
            return
        dtype = np.promote_types(self._counts.dtype, np.min_scalar_type(int(counts.max())))
        if start == 0:
            self._counts = np.broadcast_to(counts[0].astype(dtype), self._counts.shape)
        if self._is_constant and (counts == self._counts[0, 0]).all():
            return
        if self._is_constant or dtype != self._counts.dtype:
            self._counts = np.array(self._counts, dtype, order="C")
        self._counts.reshape(-1)[start : start + len(counts)] = counts

    @property
    def _is_constant(self) -> bool:
        return self._counts.strides == (0, 0)

    def counts(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the number of captions of each image, (len(rows),) int64.

        Raises:
            IndexError: An image does not exist.
        """
        if len(rows) and not 0 <= rows.min() <= rows.max() < self._images:
            raise IndexError(f"images are 0 to {self._images - 1}, asked for {rows.min()} to {rows.max()}")
        return self._counts[rows // _BLOCK, rows % _BLOCK].astype(np.int64)

    def starts(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the first caption row of each image, (len(rows),) int64; for an image without captions, the next row.

        Args:
            rows: Images; the number behind the last image is valid too.
        """
        if self._is_constant:
            return rows * int(self._counts[0, 0])
        out = np.empty(len(rows), np.int64)
        for start in range(0, len(rows), _ROWS_AT_ONCE):
            part = rows[start : start + _ROWS_AT_ONCE]
            blocks, which = np.unique(part // _BLOCK, return_inverse=True)
            counts = self._counts[blocks]
            before = counts.cumsum(axis=1, dtype=np.int64) - counts
            out[start : start + len(part)] = self._firsts[part // _BLOCK] + before[which, part % _BLOCK]
        return out

    def captions_of(self, rows: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return all caption rows of images, in their order, and the position in ``rows`` of each caption's image."""
        counts = self.counts(rows)
        positions = np.repeat(np.arange(len(rows)), counts)
        within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        return np.repeat(self.starts(rows), counts) + within, positions

    def offsets(self) -> NDArray[np.int64]:
        """Return (images + 1,) int64: the captions of image ``i`` are rows ``offsets[i]`` to ``offsets[i + 1]``."""
        return self.starts(np.arange(self._images + 1))


def _counts_in_blocks(images: int, owners: Iterable[NDArray[np.int64]], where: str) -> Iterator[NDArray[np.int64]]:
    """Yield the numbers of captions of whole blocks of images; the last block is padded with zeros."""
    last, base, begun = 0, 0, np.empty(0, np.int64)
    for rows in owners:
        if not len(rows):
            continue
        if rows[0] < last or rows[-1] >= images or (rows[1:] < rows[:-1]).any():
            raise CacheCorruptError(f"{where}: not sorted by image row from 0 to {images - 1}")
        last = int(rows[-1])
        counts = np.bincount(rows - base, minlength=len(begun))
        counts[: len(begun)] += begun
        # the last image may have more captions in the next part
        whole = (last - base) // _BLOCK * _BLOCK
        if whole:
            yield counts[:whole]
        base, begun = base + whole, counts[whole:].copy()
    stop = (images // _BLOCK + 1) * _BLOCK
    while base < stop:
        counts = np.zeros(min(stop - base, _ROWS_AT_ONCE), np.int64)
        counts[: len(begun)] = begun
        yield counts
        base, begun = base + len(counts), begun[:0]
