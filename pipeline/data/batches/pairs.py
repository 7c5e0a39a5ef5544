"""Training batches: which images, captions and views make one, in a fixed order, and the teacher's rows of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import tee
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from teacher_cache.pipeline.data.images.views import Crop
from teacher_cache.storage.errors import CacheCorruptError, UsageError
from teacher_cache.storage.read.reader import EmbeddingReader
from teacher_cache.storage.read.row_set import RowSet
from teacher_cache.storage.read.shuffle import RowDraws, batches, window_order

__all__ = [
    "CachedTeacher",
    "Pairs",
    "TeacherSource",
    "TeacherTargets",
    "describe_views",
    "epoch_pairs",
    "stored_crops",
    "views_used",
]

_CAPTION_STREAM = 2**31  # a stream of random numbers that no window of the row order uses
_VIEW_STREAM = 2**31 + 1


@dataclass(frozen=True)
class TeacherTargets:
    """The teacher's side of a batch.

    Attributes:
        image: (batch, teacher_dim) float32, normalised.
        text: (batch, captions, teacher_dim) likewise, of the captions of each image.
    """

    image: Tensor
    text: Tensor


class TeacherSource(Protocol):
    """Where a batch's targets come from: the cache, or a teacher that runs."""

    logit_scale: float

    def targets(self, pairs: Pairs) -> TeacherTargets:
        """Targets of a batch, in its order: of the view that each image names, and of its captions."""


class CachedTeacher:
    """Targets from a finished cache. No model is built or imported."""

    def __init__(self, reader: EmbeddingReader) -> None:
        self._reader = reader
        self.logit_scale = reader.manifest.identity.teacher.logit_scale
        self._coming: Iterator[Pairs] = iter(())
        self._next: Pairs | None = None
        self._streams: tuple[Iterator[NDArray[Any]], ...] = ()

    def follow(self, pairs: Iterable[Pairs]) -> None:
        """Be told the batches that :meth:`targets` will be asked for next: their rows are then read ahead.

        They are taken as they come into sight, and kept until they were asked for.

        Asked for another batch than these in their order, it reads that one by itself and goes on where it was. After
        a read that failed, it reads each by itself.
        """
        self._coming, images, texts = tee(pairs, 3)
        self._next = next(self._coming, None)
        self._streams = (
            self._reader.stream("image", ((pair.image_rows, pair.views) for pair in images)),
            self._reader.stream("text", (pair.caption_rows.ravel() for pair in texts)),
        )

    def close(self) -> None:
        """Read nothing more ahead, which ends the threads that do; what is asked for is read by itself."""
        self._coming, self._next, self._streams = iter(()), None, ()

    def targets(self, pairs: Pairs) -> TeacherTargets:
        """See :class:`TeacherSource`."""
        if pairs is self._next:
            try:
                image = next(self._streams[0])
                text = next(self._streams[1])
            except BaseException:  # a stream that has raised is at its end, and the other one a batch behind or ahead
                self.close()
                raise
            self._next = next(self._coming, None)
            if self._next is None:
                self.close()
        else:
            image = self._reader.take("image", pairs.image_rows, pairs.views)
            text = self._reader.take("text", pairs.caption_rows.ravel())
        texts = torch.from_numpy(text).float().view(*pairs.caption_rows.shape, -1)
        return TeacherTargets(torch.from_numpy(image).float(), texts)


@dataclass(frozen=True)
class Pairs:
    """One batch as row numbers of the cache: one view of image ``i`` with one or more of its captions.

    Attributes:
        image_rows, views: (batch,) int64; view 0 is the evaluation crop.
        caption_rows: (batch, captions) int64.
    """

    image_rows: NDArray[np.int64]
    caption_rows: NDArray[np.int64]
    views: NDArray[np.int64]


def epoch_pairs(
    reader: EmbeddingReader,
    image_rows: NDArray[np.int64] | RowSet,
    batch_size: int,
    window_chunks: int,
    seed: int,
    epoch: int,
    start_step: int = 0,
    views: int | None = None,
    captions_per_image: int = 1,
) -> Iterator[Pairs]:
    """The batches of one epoch, a pure function of the arguments; each image once, with captions at random.

    Of an image's captions the first is drawn, the others are those after it, in a circle; one that has fewer than are
    asked for gives some of them more than once.

    An image goes through all its views before one comes again: each starts at a view of its own, drawn by the seed,
    and takes the next one in the next epoch. With one view that is always the evaluation crop.

    Args:
        image_rows: rows that take part.
        start_step: leave out so many batches at the start, to go on where a run stopped.
        views: the first so many take part; all if left out.
    """
    views = views or reader.views
    index = reader.caption_index
    chunk_rows = reader.manifest.layout.image_chunk_rows
    # one draw per row of the cache, so that a row's caption does not depend on who else takes part
    draws = RowDraws(seed, epoch, _CAPTION_STREAM, chunk_rows, 2 * window_chunks)
    # the same in each epoch, so that an image's views come by turns
    first_views = RowDraws(seed, 0, _VIEW_STREAM, chunk_rows, 2 * window_chunks) if views > 1 else None
    order = window_order(image_rows, chunk_rows, window_chunks, seed, epoch)
    for step, rows in enumerate(batches(order, batch_size)):
        if step >= start_step:
            counts = index.counts(rows)
            drawn = (draws.of(rows) * counts).astype(np.int64)[:, None] + np.arange(captions_per_image)
            captions = index.starts(rows)[:, None] + drawn % counts[:, None]
            first = np.zeros_like(rows) if first_views is None else (first_views.of(rows) * views).astype(np.int64)
            yield Pairs(rows, captions, (first + epoch) % views)


def views_used(reader: EmbeddingReader, asked: int | None) -> int:
    """How many of a cache's views a run takes.

    Args:
        asked: the first so many; None for all.

    Raises:
        UsageError: the cache has not so many.
    """
    if asked is not None and asked > reader.views:
        raise UsageError(
            f"{reader.location}: {asked} views asked for, this cache has {reader.views}. Add some with "
            f"teacher-cache precompute --views {asked}, or lower --views."
        )
    return asked or reader.views


def describe_views(reader: EmbeddingReader, asked: int | None = None) -> str:
    """What a student sees of each image when it learns from this cache, for the record of its run.

    Args:
        asked: as for :func:`views_used`.
    """
    used = views_used(reader, asked)
    of = "the cache has one view" if reader.views == 1 else f"of {reader.views} views"
    if used == 1:
        return f"evaluation crop ({of})"
    stored = f"the {used} stored crops" if used == reader.views else f"the first {used} of {reader.views} stored crops"
    return f"{stored} by turns, the evaluation crop among them"


def stored_crops(reader: EmbeddingReader, rows: NDArray[np.int64], views: NDArray[np.int64]) -> list[Crop | None]:
    """What the teacher saw of some images, one view of each, as the cache has it; None for the evaluation crop.

    Raises:
        CacheCorruptError: the cache is damaged, or what it stores is no crop.
    """
    if not views.any():  # a cache of one view would be asked for an object more per chunk, to learn nothing
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
