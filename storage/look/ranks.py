"""Ranks of retrieval in both directions from one product of images and captions: exact, in bounded memory, numpy alone.

Nothing is sorted. A query's rank is how many rows score above the best of its positives, so one pass over tiles of the
scores counts for the images (along rows) and for the captions (along columns) at once. The tiles are float32; whatever
lies within float32's rounding error of the positive is decided by scores in float64, and equal ones by the lower row.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cached_property, partial
from threading import Lock
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from teacher_cache.storage.look.nearest import paired_scores, unit_rows

__all__ = ["NO_POSITIVE", "first_positive_ranks", "recall_of_ranks"]

NO_POSITIVE = int(np.iinfo(np.int64).max)
# images that are made float32 together; a thread takes some captions, and these images a tile of the scores at a time
_IMAGES_AT_ONCE = 4_096
# large enough for BLAS, and small enough to stay near the core that counts in it
_TILE_IMAGES = 256
_TILE_TEXTS = 1_024
# from one score in so many on, comparing all of a tile again costs less than picking them out
_SPARSE = 64
# a score of a pair by itself takes as long as so many of a product, and a product as long as one of 16 rows at least
_PAIRS_FOR_PRODUCT = 24
_PAIRS_AT_ONCE = 2_048

_Rows = NDArray[np.int64]
_Floats = NDArray[Any]


def first_positive_ranks(
    image: _Floats,
    text: _Floats,
    text_image: _Rows,
    depth: int | None = None,
    cosine: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[_Rows, _Rows]:
    """How many rows come before the first positive of each image and of each caption, by inner product.

    Equal scores go by row number. Besides its arguments it holds some numbers per row, and for each core tiles of a
    fixed size: less than 150 MB on two cores, at any size. BLAS has one thread per call meanwhile, in all of the
    process.

    Args:
        image: (images, dim) of any float type; made float32 some rows at a time.
        text: (captions, dim) likewise.
        text_image: (captions,) position of each caption's image in ``image``; any caption of an image is its positive.
        depth: count no further than this; all if left out. Queries that are beyond it cost no second look.
        cosine: compare rows of unit norm, made by ``teacher_cache.storage.look.nearest.unit_rows``, rather than the
        rows as they are.
        progress: called with images done and of how many; first with 0, when the positives have their scores.

    Returns:
        int64 (images,) and (captions,): 0 where a positive is the nearest, at most ``depth``; :data:`NO_POSITIVE` of an
        image without captions.

    Raises:
        ValueError: other widths, a position outside, depth below 1, or a value that is not finite; with ``cosine``
            also a row of zeros.
    """
    if image.ndim != 2 or text.ndim != 2 or image.shape[1] != text.shape[1]:
        raise ValueError(f"images {image.shape} and captions {text.shape} must both be (rows, dim) of one dim")
    if text_image.shape != (len(text),) or (len(text) and not 0 <= text_image.min() <= text_image.max() < len(image)):
        raise ValueError(f"text_image must give each of {len(text)} captions a position in 0 ... {len(image) - 1}")
    if depth is not None and depth < 1:
        raise ValueError(f"depth is {depth}, at least 1 wanted")
    count = _Count(_Rows32(image, cosine), _Rows32(text, cosine), text_image, depth)
    tiles = -(-len(text) // _TILE_TEXTS)
    threads = min(os.cpu_count() or 1, tiles)
    # a thread multiplies and counts by itself: if BLAS split each product among the cores, one would count alone
    alone = threadpool_limits(1, "blas") if threads > 1 else nullcontext()
    with alone, ThreadPoolExecutor(max(1, threads)) as pool:
        if progress is not None:
            progress(0, len(image))
        for start in range(0, len(image), _IMAGES_AT_ONCE):
            images = slice(start, min(start + _IMAGES_AT_ONCE, len(image)))
            rows = count.rows_of(images)
            list(pool.map(partial(count.add, images, rows), range(0, len(text), _TILE_TEXTS)))
            if progress is not None:
                progress(images.stop, len(image))
    i2t, t2i = (np.minimum(side.before, depth or NO_POSITIVE) for side in (count.images, count.texts))
    i2t[np.bincount(text_image, minlength=len(image)) == 0] = NO_POSITIVE
    return i2t, t2i


@dataclass(frozen=True)
class _Rows32:
    """Rows as float32, made when they are asked for; the same whichever are asked for together."""

    stored: _Floats
    cosine: bool

    @property
    def shape(self) -> tuple[int, ...]:
        return self.stored.shape

    def __len__(self) -> int:
        return len(self.stored)

    def __getitem__(self, index: slice | _Rows) -> NDArray[np.float32]:
        rows = self.stored[index]
        if not self.cosine:
            return np.ascontiguousarray(rows, np.float32)
        with np.errstate(invalid="ignore", divide="ignore"):  # a row of zeros is refused with those that are not finite
            return unit_rows(rows)


@dataclass
class _Side:
    """The queries of one direction.

    Attributes:
        axis: of a tile's scores that they lie along: 0 for images, 1 for captions.
        best: (n,) float64, the score of the first positive; -inf where there is none.
        first: (n,) its row.
        reach: (n,) no score of the query is greater.
        dim: products in a score.
        dtype: of the tiles.
        depth: queries with so many rows before are done with.
    """

    axis: Literal[0, 1]
    best: NDArray[np.float64]
    first: _Rows
    reach: NDArray[np.float64]
    dim: int
    dtype: type[np.float32] | type[np.float64]
    depth: int | None
    before: _Rows = field(init=False)
    _lock: Lock = field(init=False, default_factory=Lock)

    def __post_init__(self) -> None:
        self.before = np.zeros(len(self.best), np.int64)
        error = self.error if self.dtype is np.float64 else 1.01 * self.dim * (2.0**-24 * self.reach + 2.0**-126)
        # away from the positive's score: rounded to the tiles' type they must not come nearer
        self.low = np.nextafter((self.best - error).astype(self.dtype), self.dtype(-np.inf))
        self.high = np.nextafter((self.best + error).astype(self.dtype), self.dtype(np.inf))
        self.low[np.isneginf(self.best)] = np.inf

    @cached_property
    def error(self) -> NDArray[np.float64]:
        """By how much a score by BLAS in float64 may differ from one by ``paired_scores``: each may be off by half."""
        # a sum of dim products is off by less than dim * unit roundoff * |q| |g| (Higham 2002, eq. 3.7; 1.01 for its
        # denominator), and by what underflows
        return 2.02 * self.dim * (2.0**-53 * self.reach + 2.0**-1022)

    def add(self, part: slice, counts: _Rows) -> None:
        """So many more rows come before some queries; nothing shall reach those that are beyond the depth by now."""
        with self._lock:
            self.before[part] += counts
            if self.depth is not None:
                self.low[part][self.before[part] >= self.depth] = np.inf

    def along(self, values: NDArray[Any]) -> NDArray[Any]:
        """Numbers of some queries, so that they broadcast along a tile."""
        return values[:, None] if self.axis == 0 else values


@dataclass(frozen=True)
class _Tile:
    """Scores of some images (rows) and captions (columns).

    Attributes:
        parts: which images and which captions.
        rows: theirs.
    """

    scores: _Floats
    parts: tuple[slice, slice]
    rows: tuple[NDArray[Any], NDArray[Any]]


class _Count:
    """Both directions of one gallery, counted image by image.

    Raises:
        ValueError: a value is not finite.
    """

    def __init__(self, image: _Rows32, text: _Rows32, text_image: _Rows, depth: int | None) -> None:
        self._image, self._text, self._text_image = image, text, text_image
        own = np.empty(len(text))
        lengths = np.empty(len(image)), np.empty(len(text))
        for start in range(0, len(image), _TILE_IMAGES):
            part = slice(start, start + _TILE_IMAGES)
            lengths[0][part] = _lengths(image[part])
        for start in range(0, len(text), _TILE_TEXTS):
            part = slice(start, start + _TILE_TEXTS)
            rows = text[part]
            lengths[1][part] = _lengths(rows)
            own[part] = paired_scores(rows, image[text_image[part]])
        if not all(np.isfinite(some).all() for some in lengths):
            raise ValueError("images and captions must be finite" + (", no row all zeros" if image.cosine else ""))
        longest = [float(some.max(initial=0.0)) for some in lengths]
        # where float32 may overflow it is not asked
        self._dtype = np.float32 if longest[0] * longest[1] < 2.0**120 else np.float64
        best = np.full(len(image), -np.inf)
        np.maximum.at(best, text_image, own)
        first = np.full(len(image), len(text), np.int64)
        top = np.flatnonzero(own == best[text_image])
        np.minimum.at(first, text_image[top], top)
        dim = image.shape[1]
        self.images = _Side(0, best, first, lengths[0] * longest[1], dim, self._dtype, depth)
        self.texts = _Side(1, own, text_image, lengths[1] * longest[0], dim, self._dtype, depth)

    def rows_of(self, images: slice) -> _Floats:
        """Some images as they are multiplied."""
        return self._image[images].astype(self._dtype, copy=False)

    def add(self, images: slice, rows: _Floats, start: int) -> None:
        """Count what some images have to do with a tile's width of captions; several threads may.

        Args:
            rows: :meth:`rows_of` these images.
            start: the first caption.
        """
        texts = slice(start, min(start + _TILE_TEXTS, len(self._text)))
        columns = self._text[texts].astype(self._dtype, copy=False)
        width = len(columns)
        scores = np.empty((min(_TILE_IMAGES, len(rows)), width), self._dtype)
        mask = np.empty(scores.shape, bool)
        for top in range(0, len(rows), _TILE_IMAGES):
            some = rows[top : top + _TILE_IMAGES]
            part = slice(images.start + top, images.start + top + len(some))
            tile = _Tile(np.matmul(some, columns.T, out=scores[: len(some)]), (part, texts), (some, columns))
            for side in (self.images, self.texts):
                low = side.along(side.low[tile.parts[side.axis]])
                self._count(tile, side, np.greater_equal(tile.scores, low, out=mask[: len(some)]))

    def _count(self, tile: _Tile, side: _Side, reached: NDArray[np.bool_]) -> None:
        """Count a tile for one side.

        Args:
            reached: scores that may be above the query's positive.
        """
        part = tile.parts[side.axis]
        high = side.high[part]
        if np.count_nonzero(reached) <= reached.size // _SPARSE:
            pairs = _places(reached)
            above = tile.scores[pairs] > high[pairs[side.axis]]
            side.add(part, np.bincount(pairs[side.axis][above], minlength=len(high)))
            pairs = pairs[0][~above], pairs[1][~above]
        else:
            above = tile.scores > side.along(high)
            side.add(part, _trues(above, 1 - side.axis))
            reached ^= above
            reached &= side.along(side.low[part] < np.inf)
            pairs = _places(reached)
        self._decide(tile, side, self._by_product(tile, side, pairs))

    def _by_product(self, tile: _Tile, side: _Side, pairs: tuple[_Rows, _Rows]) -> tuple[_Rows, _Rows]:
        """Places that a product in float64 leaves open too, the others counted; all of them where they are few."""
        counts = np.bincount(pairs[side.axis])
        queries = np.flatnonzero(counts)
        if len(pairs[0]) <= _PAIRS_FOR_PRODUCT * (16 + len(queries)):
            return pairs
        of = (np.cumsum(counts > 0) - 1)[pairs[side.axis]]
        # of rows of a student that has collapsed to one direction, say, float32 tells no scores apart
        asked, others = tile.rows[side.axis][queries], tile.rows[1 - side.axis]
        scores = (asked.astype(np.float64) @ others.T.astype(np.float64))[of, pairs[1 - side.axis]]
        part = tile.parts[side.axis]
        best, error = side.best[part][queries][of], side.error[part][queries][of]
        above = scores > best + error
        side.add(part, np.bincount(pairs[side.axis][above], minlength=part.stop - part.start))
        still = ~above & (scores >= best - error)
        return pairs[0][still], pairs[1][still]

    def _decide(self, tile: _Tile, side: _Side, pairs: tuple[_Rows, _Rows]) -> None:
        """By scores in float64, places of a tile that float32 leaves open."""
        images, texts = (place + part.start for place, part in zip(pairs, tile.parts, strict=True))
        # no other positive comes before the first one
        open_pairs = (self._text_image[texts] != images) & (side.low[(images, texts)[side.axis]] < np.inf)
        images, texts = images[open_pairs], texts[open_pairs]
        for start in range(0, len(images), _PAIRS_AT_ONCE):
            some = slice(start, start + _PAIRS_AT_ONCE)
            both = images[some], texts[some]
            query, row = both[side.axis], both[1 - side.axis]
            scores = paired_scores(self._image[both[0]], self._text[both[1]])
            best = side.best[query]
            ahead = (scores > best) | ((scores == best) & (row < side.first[query]))
            part = tile.parts[side.axis]
            side.add(part, np.bincount(query[ahead] - part.start, minlength=part.stop - part.start))


def _lengths(rows: NDArray[np.float32]) -> NDArray[np.float64]:
    """(rows,) norms, to float32's precision or better; not finite where a value is not."""
    with np.errstate(over="ignore"):
        squares = np.einsum("nd,nd->n", rows, rows)
    if not ((squares > 1e-20) & (squares < 1e30)).all():  # they may have left float32's range on the way
        return np.asarray(np.sqrt(np.einsum("nd,nd->n", rows, rows, dtype=np.float64)))
    return np.asarray(1.001 * np.sqrt(squares, dtype=np.float64))


def _places(mask: NDArray[np.bool_]) -> tuple[_Rows, _Rows]:
    """Rows and columns of what is true; quick where that is little."""
    packed = np.packbits(mask.reshape(-1), bitorder="little")
    at = np.flatnonzero(packed != 0)
    byte, bit = np.divmod(np.flatnonzero(np.unpackbits(packed[at], bitorder="little")), 8)
    row, column = np.divmod(8 * at[byte] + bit, mask.shape[1])
    return row, column


def _trues(mask: NDArray[np.bool_], axis: int) -> _Rows:
    """How many are true along an axis; fewer than 256 at a time, whose sum a byte holds."""
    counts = np.zeros(mask.shape[1 - axis], np.int64)
    for start in range(0, mask.shape[axis], 255):
        some = mask[start : start + 255] if axis == 0 else mask[:, start : start + 255]
        counts += np.add.reduce(some.view(np.uint8), axis=axis, dtype=np.uint8)
    return counts


def recall_of_ranks(ranks: _Rows, ks: Sequence[int]) -> dict[str, float]:
    """Share of queries, in percent, with a positive among the first K: ``{"R@1": ...}``.

    Raises:
        ValueError: no queries.
    """
    if not len(ranks):
        raise ValueError("recall of no queries is not defined")
    return {f"R@{k}": 100 * int((ranks < k).sum()) / len(ranks) for k in ks}
