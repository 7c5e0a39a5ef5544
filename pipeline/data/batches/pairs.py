"""Order of training pairs, and the crop of each pair's image."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from teacher_cache.pipeline.data.images.views import Crop
from teacher_cache.storage.errors import CacheCorruptError, UsageError
from teacher_cache.storage.read.reader import EmbeddingReader
from teacher_cache.storage.read.rows import RowSet
from teacher_cache.storage.read.shuffle import RowDraws, batches, window_order

_CAPTION_STREAM = 2**31  # a random stream that no window of the row order uses
_VIEW_STREAM = 2**31 + 1


@dataclass(frozen=True)
class Pairs:
    """Batch as row numbers of the cache: one view of image ``i`` with one or more of its captions.

    Attributes:
        image_rows, views: (batch,) int64; view 0 is the evaluation crop.
        caption_rows: (batch, captions) int64; captions may be 0.
    """

    image_rows: NDArray[np.int64]
    caption_rows: NDArray[np.int64]
    views: NDArray[np.int64]

    def part(self, rank: int, ranks: int) -> Pairs:
        """Return one rank's share. The shares of all ranks, in order, make up the batch."""
        size = len(self.image_rows) // ranks
        span = slice(rank * size, (rank + 1) * size)
        return Pairs(self.image_rows[span], self.caption_rows[span], self.views[span])


class CaptionDraw:
    """Captions of images, from one random number for each image.

    The first caption is drawn at random, the others follow it cyclically, so an image with too few captions repeats
    some. With kinds, an image first draws the kind, among those that it has, and then captions of this kind.

    Args:
        captions_per_image: number of captions to draw; may be 0.
        kinds: weight of each kind. Default: all captions alike, whatever their kind.

    Raises:
        UsageError: the cache has no such kind; the message lists the kinds.
    """

    def __init__(
        self, reader: EmbeddingReader, captions_per_image: int = 1, kinds: Mapping[str, float] | None = None
    ) -> None:
        self._reader, self._captions = reader, np.arange(captions_per_image)
        self._kinds = sorted(kinds or ())
        self._weights = np.array([kinds[kind] for kind in self._kinds] if kinds else [], np.float64)
        reader.kind_entries(np.empty(0, np.int64), self._kinds)

    def rows(self, image_rows: NDArray[np.int64], draws: NDArray[np.floating[Any]]) -> NDArray[np.int64]:
        """Return caption rows, (images, captions) int64.

        Args:
            draws: (images,) numbers of [0, 1).
        """
        if self._kinds:
            starts, counts, draws = self._of_a_kind(image_rows, draws)
        else:
            index = self._reader.caption_index
            starts, counts = index.starts(image_rows), index.counts(image_rows)
        drawn = (draws * counts).astype(np.int64)[:, None] + self._captions
        return starts[:, None] + drawn % np.maximum(counts, 1)[:, None]

    def _of_a_kind(
        self, image_rows: NDArray[np.int64], draws: NDArray[np.floating[Any]]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]]:
        """Return first row and number of the captions of the kind that each image draws, and what is left of the draw.

        Where a number falls among the kinds' shares decides the kind; where it falls in this share, the caption.
        """
        index, entries = self._reader.kind_index, self._reader.kind_entries(image_rows, self._kinds)
        counts = index.counts(entries.ravel()).reshape(entries.shape)
        ends = np.cumsum(self._weights * (counts > 0), axis=1)
        if not ends[:, -1].all():
            self._reader.require_captions(image_rows, "Draw from another kind too.", self._kinds)
        at = np.minimum(draws * ends[:, -1], np.nextafter(ends[:, -1], 0))  # the product may be rounded up to the end
        kind = (at[:, None] >= ends).sum(axis=1)
        image = np.arange(len(image_rows))
        rest = 1 - (ends[image, kind] - at) / self._weights[kind]
        return index.starts(entries[image, kind]), counts[image, kind], np.clip(rest, 0, np.nextafter(1, 0))


class PairOrder:
    """Batches of each epoch, a pure function of the arguments, the epoch and the step.

    Each image comes once per epoch, with captions as :class:`CaptionDraw` draws them.

    An image goes through all its views before one repeats: it starts at a view drawn by the seed and takes the next one
    in the next epoch. With one view it is always the evaluation crop.

    Args:
        image_rows: rows to train on.
        views: number of the cache's views to use, from the first. Default: all.
        captions_per_image, caption_kinds: as for :class:`CaptionDraw`.
    """

    def __init__(
        self,
        reader: EmbeddingReader,
        image_rows: NDArray[np.int64] | RowSet,
        batch_size: int,
        window_chunks: int = 16,
        seed: int = 0,
        views: int | None = None,
        captions_per_image: int = 1,
        caption_kinds: Mapping[str, float] | None = None,
    ) -> None:
        self._reader, self._rows, self._seed = reader, image_rows, seed
        self._batch_size, self._window_chunks = batch_size, window_chunks
        self._views, self._captions = views or reader.views, CaptionDraw(reader, captions_per_image, caption_kinds)

    def epoch(self, number: int, start_step: int = 0) -> Iterator[Pairs]:
        """Yield the batches of an epoch.

        Args:
            number: the epoch, from 0.
            start_step: first batch to yield, for a run that resumes within an epoch.
        """
        views = self._views
        chunk_rows = self._reader.manifest.layout.image_chunk_rows
        # one draw per row of the cache, so that a row's caption does not depend on the other rows
        draws = RowDraws(self._seed, number, _CAPTION_STREAM, chunk_rows, 2 * self._window_chunks)
        # the same in every epoch, so that an image's views take turns
        first_views = RowDraws(self._seed, 0, _VIEW_STREAM, chunk_rows, 2 * self._window_chunks) if views > 1 else None
        order = window_order(self._rows, chunk_rows, self._window_chunks, self._seed, number)
        for step, rows in enumerate(batches(order, self._batch_size)):
            if step < start_step:
                continue
            captions = self._captions.rows(rows, draws.of(rows))
            first = np.zeros_like(rows) if first_views is None else (first_views.of(rows) * views).astype(np.int64)
            yield Pairs(rows, captions, (first + number) % views)


def views_used(reader: EmbeddingReader, views: int | None) -> int:
    """Return the number of a cache's views that a run uses.

    Args:
        views: number in the settings. None: all.

    Raises:
        UsageError: the cache has fewer views.
    """
    if views is not None and views > reader.views:
        raise UsageError(
            f"{reader.location}: {views} views asked for, this cache has {reader.views}. Set views to at "
            f"most {reader.views}, or make a cache with more: teacher-cache precompute --views {views} "
            "--reuse OLD --cache NEW."
        )
    return views or reader.views


def describe_views(reader: EmbeddingReader, views: int | None = None) -> str:
    """Describe, for a run's record, the crops that a student of this cache sees.

    Args:
        views: as for :func:`views_used`.
    """
    used = views_used(reader, views)
    available = "the cache has one view" if reader.views == 1 else f"of {reader.views} views"
    if used == 1:
        return f"evaluation crop ({available})"
    stored = f"the {used} stored crops" if used == reader.views else f"the first {used} of {reader.views} stored crops"
    return f"{stored} by turns, the evaluation crop among them"


def stored_crops(reader: EmbeddingReader, rows: NDArray[np.int64], views: NDArray[np.int64]) -> list[Crop | None]:
    """Return the stored crop of one view of each image. None stands for the evaluation crop.

    Raises:
        CacheCorruptError: the cache is damaged, or a stored box is no crop.
    """
    if not views.any():  # view 0 needs no crop: save one object read per chunk
        return [None] * len(rows)
    boxes = reader.take("image", rows, views, array="view")
    crops: list[Crop | None] = []
    for row, view, box in zip(rows.tolist(), views.tolist(), boxes, strict=True):
        try:
            crops.append(None if view == 0 else Crop.from_row(box))
        except ValueError as error:
            raise CacheCorruptError(
                f"{reader.location}: image row {row}, view {view}: {error}. Run teacher-cache repair CACHE."
            ) from error
    return crops
