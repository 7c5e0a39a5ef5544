"""Order of training pairs, and the crop of each pair's image."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

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


class PairOrder:
    """Batches of each epoch, a pure function of the arguments, the epoch and the step.

    Each image comes once per epoch. Its first caption is drawn at random; the others follow cyclically, so an image
    with too few captions repeats some.

    An image goes through all its views before one repeats: it starts at a view drawn by the seed and takes the next one
    in the next epoch. With one view it is always the evaluation crop.

    Args:
        image_rows: rows to train on.
        views: number of the cache's views to use, from the first. Default: all.
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
    ) -> None:
        self._reader, self._rows, self._seed = reader, image_rows, seed
        self._batch_size, self._window_chunks = batch_size, window_chunks
        self._views, self._captions = views or reader.views, np.arange(captions_per_image)

    def epoch(self, number: int, start_step: int = 0) -> Iterator[Pairs]:
        """Yield the batches of an epoch.

        Args:
            number: the epoch, from 0.
            start_step: first batch to yield, for a run that resumes within an epoch.
        """
        index, views = self._reader.caption_index, self._views
        chunk_rows = self._reader.manifest.layout.image_chunk_rows
        # one draw per row of the cache, so that a row's caption does not depend on the other rows
        draws = RowDraws(self._seed, number, _CAPTION_STREAM, chunk_rows, 2 * self._window_chunks)
        # the same in every epoch, so that an image's views take turns
        first_views = RowDraws(self._seed, 0, _VIEW_STREAM, chunk_rows, 2 * self._window_chunks) if views > 1 else None
        order = window_order(self._rows, chunk_rows, self._window_chunks, self._seed, number)
        for step, rows in enumerate(batches(order, self._batch_size)):
            if step < start_step:
                continue
            counts = index.counts(rows)
            drawn = (draws.of(rows) * counts).astype(np.int64)[:, None] + self._captions
            captions = index.starts(rows)[:, None] + drawn % counts[:, None]
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
