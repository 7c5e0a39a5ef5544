"""Which captions are an image's: next to nothing where images have equally many, else in a byte for each image."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
from numpy.typing import NDArray

from teacher_cache.storage.errors import CacheCorruptError

__all__ = ["CaptionIndex"]

_BLOCK = 256
_ROWS_AT_ONCE = 4096


class CaptionIndex:
    """How many captions each image has, and the first caption's row of every 256th image.

    A block of 256 images that have equally many keeps that number; only of other blocks each image's own is kept.

    Args:
        images: that there are.
        owners: the ``image_row`` column of the captions table, in parts.
        where: the table, for messages.

    Raises:
        CacheCorruptError: the captions of an image are not side by side, in the order of the images.
    """

    def __init__(self, images: int, owners: Iterable[NDArray[np.int64]], where: str) -> None:
        # the row behind the last image has a block too
        self._images, blocks = images, images // _BLOCK + 1
        self._firsts, self._each = np.zeros(blocks + 1, np.int64), np.zeros(blocks, np.uint8)
        self._uneven, self._counts = np.empty(0, np.int64), np.empty((0, _BLOCK), np.uint8)
        done = 0
        for counts in _counts_in_blocks(images, owners, where):
            here = counts.reshape(-1, _BLOCK)
            self._add(done, here)
            done += len(here)

    def _add(self, block: int, counts: NDArray[np.int64]) -> None:
        stop = block + len(counts)
        self._firsts[block + 1 : stop + 1] = self._firsts[block] + counts.sum(axis=1).cumsum()
        self._each = _wide_enough(self._each, counts)
        self._each[block:stop] = counts[:, 0]
        # behind the last image nothing is looked up
        same = counts == counts[:, :1]
        same[-1] |= np.arange(_BLOCK) >= self._images - (stop - 1) * _BLOCK
        uneven = np.flatnonzero(~same.all(axis=1))
        if len(uneven):
            self._uneven = np.concatenate([self._uneven, uneven + block])
            self._counts = _wide_enough(self._counts, counts)
            # in place: one after another would hold them twice
            self._counts.resize((len(self._uneven), _BLOCK), refcheck=False)
            self._counts[-len(uneven) :] = counts[uneven]

    def _places(self, blocks: NDArray[np.int64]) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
        """Which of some blocks are uneven, by position, and where their counts are."""
        if not len(self._uneven):
            return np.empty(0, np.intp), np.empty(0, np.intp)
        places = np.minimum(np.searchsorted(self._uneven, blocks), len(self._uneven) - 1)
        found = np.flatnonzero(self._uneven[places] == blocks)
        return found, places[found]

    def counts(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Captions of each of some images, (len(rows),) int64.

        Raises:
            IndexError: an image that there is not.
        """
        if len(rows) and not 0 <= rows.min() <= rows.max() < self._images:
            raise IndexError(f"images are 0 to {self._images - 1}, asked for {rows.min()} to {rows.max()}")
        out = self._each[rows // _BLOCK].astype(np.int64)
        found, places = self._places(rows // _BLOCK)
        out[found] = self._counts[places, rows[found] % _BLOCK]
        return out

    def starts(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """The first caption's row of each of some images, (len(rows),) int64; of one without, where it would be.

        Args:
            rows: also the one behind the last image.
        """
        out = np.empty(len(rows), np.int64)
        for start in range(0, len(rows), _ROWS_AT_ONCE):
            some = rows[start : start + _ROWS_AT_ONCE]
            within = some % _BLOCK * self._each[some // _BLOCK].astype(np.int64)
            found, places = self._places(some // _BLOCK)
            uneven, which = np.unique(places, return_inverse=True)
            counts = self._counts[uneven]
            before = counts.cumsum(axis=1, dtype=np.int64) - counts
            within[found] = before[which, some[found] % _BLOCK]
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
        return self.starts(np.arange(self._images + 1))


def _counts_in_blocks(images: int, owners: Iterable[NDArray[np.int64]], where: str) -> Iterator[NDArray[np.int64]]:
    """How many captions each image has, some whole blocks of images at a time; the last one is filled with none."""
    last, base, begun = 0, 0, np.empty(0, np.int64)
    for rows in owners:
        if not len(rows):
            continue
        if rows[0] < last or rows[-1] >= images or (rows[1:] < rows[:-1]).any():
            raise CacheCorruptError(f"{where}: not sorted by image row from 0 to {images - 1}")
        last = int(rows[-1])
        counts = np.bincount(rows - base, minlength=len(begun))
        counts[: len(begun)] += begun
        # the last image may have more of them in the next part
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


def _wide_enough(kept: NDArray[np.unsignedinteger], counts: NDArray[np.int64]) -> NDArray[np.unsignedinteger]:
    """The same, of a type that holds these counts too."""
    wanted = np.min_scalar_type(int(counts.max()))
    return kept.astype(wanted) if wanted.itemsize > kept.dtype.itemsize else kept
