"""Training batches: pixels and tokens for the student, the teacher's rows from the cache, in a fixed order."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import tee
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from pipeline.cached_images import CachedImages
from pipeline.decode import UndecodableImageError
from pipeline.pixels import ReadyPixels
from pipeline.preprocess import Preprocess
from pipeline.samples import ImageSource
from pipeline.scaled_jpeg import open_image
from pipeline.views import Crop, crop_shown
from storage.errors import CacheCorruptError, CacheError, UsageError
from storage.order import batches, epoch_rng, window_order
from storage.reader import EmbeddingReader

__all__ = [
    "CachedTeacher",
    "Pairs",
    "StudentImages",
    "TeacherSource",
    "TeacherTargets",
    "describe_views",
    "epoch_inputs",
    "epoch_pairs",
    "load_items",
    "stored_crops",
    "views_used",
]

Tokenizer = Callable[[list[str]], Tensor]

_CAPTION_STREAM = 2**31  # a stream of random numbers that no window of the row order uses
_VIEW_STREAM = 2**31 + 1


@dataclass(frozen=True)
class TeacherTargets:
    """The teacher's side of a batch.

    Attributes:
        image, text: (batch, teacher_dim) float32, normalised.
    """

    image: Tensor
    text: Tensor


class TeacherSource(Protocol):
    """Where a batch's targets come from: the cache, or a teacher that runs."""

    logit_scale: float

    def targets(self, pairs: Pairs) -> TeacherTargets:
        """Targets of a batch, in its order: of the view that each pair names, and of its caption."""


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
            self._reader.stream("text", (pair.caption_rows for pair in texts)),
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
            text = self._reader.take("text", pairs.caption_rows)
        return TeacherTargets(torch.from_numpy(image).float(), torch.from_numpy(text).float())


@dataclass(frozen=True)
class Pairs:
    """One batch as row numbers of the cache: one view of image ``i`` with one of its captions.

    Attributes:
        image_rows, caption_rows, views: (batch,) int64; view 0 is the evaluation crop.
    """

    image_rows: NDArray[np.int64]
    caption_rows: NDArray[np.int64]
    views: NDArray[np.int64]


def epoch_pairs(
    reader: EmbeddingReader,
    image_rows: NDArray[np.int64],
    batch_size: int,
    window_chunks: int,
    seed: int,
    epoch: int,
    start_step: int = 0,
    views: int | None = None,
) -> Iterator[Pairs]:
    """The batches of one epoch, a pure function of the arguments; each image once, with one caption at random.

    An image goes through all its views before one comes again: each starts at a view of its own, drawn by the seed,
    and takes the next one in the next epoch. With one view that is always the evaluation crop.

    Args:
        image_rows: ascending rows that take part.
        start_step: leave out so many batches at the start, to go on where a run stopped.
        views: the first so many take part; all if left out.
    """
    views = views or reader.views
    offsets = reader.caption_offsets
    # one draw per row of the cache, so that a row's caption does not depend on who else takes part
    draws = epoch_rng(seed, epoch, _CAPTION_STREAM).random(reader.manifest.layout.image_rows)
    # the same in each epoch, so that an image's views come by turns
    first_views = (epoch_rng(seed, 0, _VIEW_STREAM).random(len(draws)) * views).astype(np.int64)
    chunk_rows = reader.manifest.layout.image_chunk_rows
    order = window_order(image_rows, chunk_rows, window_chunks, seed, epoch)
    for step, rows in enumerate(batches(order, batch_size)):
        if step >= start_step:
            counts = offsets[rows + 1] - offsets[rows]
            captions = offsets[rows] + (draws[rows] * counts).astype(np.int64)
            yield Pairs(rows, captions, (first_views[rows] + epoch) % views)


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


class StudentImages(Dataset[Tensor]):
    """Row of the cache to the pixels that a model sees of this image: float32 (3, height, width).

    By row alone its evaluation crop, as evaluation wants it; with :meth:`see` any view. Decoded as the cache says.

    Raises:
        UsageError: the decoder needs a package that is not installed.

    Raises on access:
        OSError: the image cannot be read where the source says.
        CacheMismatchError: it is there and is not the image that the teacher saw.
    """

    def __init__(self, reader: EmbeddingReader, source: ImageSource, preprocess: Preprocess) -> None:
        self._images = CachedImages(reader, source)
        self._preprocess = preprocess.decoded_by(reader.manifest.identity.preprocess.decoder)
        self._shown = self._preprocess.shown()

    def __getitem__(self, row: int) -> Tensor:
        return self.see(row, None)

    def ahead(self, rows: Sequence[int]) -> AbstractContextManager[None]:
        """See :meth:`pipeline.cached_images.CachedImages.ahead`."""
        return self._images.ahead(rows)

    def see(self, row: int, crop: Crop | None) -> Tensor:
        """The same for a crop of the image, at the model's own resolution; for None its evaluation crop."""
        return self._preprocess.normalized(self.shown(row, crop))

    def shown(self, row: int, crop: Crop | None) -> NDArray[np.uint8]:
        """What :meth:`see` normalises: RGB uint8 (height, width, 3)."""
        return self.each_shown(row, [crop])[0]

    def each_shown(self, row: int, crops: Sequence[Crop | None]) -> list[NDArray[np.uint8]]:
        """:meth:`shown` of several crops of an image that is decoded once."""
        data = self._images.read(row)
        try:
            image = open_image(data, self._preprocess.decoder)
            return [self._shown(image) if crop is None else crop_shown(image, crop, self._preprocess) for crop in crops]
        except (UndecodableImageError, ArithmeticError, ValueError, RuntimeError) as error:
            raise OSError(
                f"{self._images.named(row)} cannot be decoded here, though the teacher saw it: {error}"
            ) from error


class _ReadAhead(Protocol):
    """Items by a key, and a way to say which are wanted next."""

    def ahead(self, keys: Sequence[Any], /) -> AbstractContextManager[None]:
        """See :meth:`pipeline.cached_images.CachedImages.ahead`."""

    def __getitem__(self, key: Any, /) -> Any: ...


class _ShownImages(Protocol):
    """Rows of the cache to what a student sees of some region, bytes to be normalised."""

    def ahead(self, rows: Sequence[int], /) -> AbstractContextManager[None]:
        """See :meth:`pipeline.cached_images.CachedImages.ahead`."""

    def shown(self, row: int, region: Any, /) -> NDArray[np.uint8]:
        """RGB uint8 (height, width, 3), writable."""


class _StudentInputs(Dataset[tuple[Tensor, Tensor]]):
    """What is shown, uint8 (height, width, 3), and token ids of one (image row, caption row, what to see of the image).

    Args:
        images: give what is shown of an image row, and what to see of it.
    """

    def __init__(self, images: _ShownImages, texts: pa.ChunkedArray, tokenizer: Tokenizer) -> None:
        self._images, self._texts, self._tokenizer = images, texts, tokenizer

    def ahead(self, pairs: Sequence[tuple[int, int, Any]]) -> AbstractContextManager[None]:
        """See :meth:`pipeline.cached_images.CachedImages.ahead`."""
        return self._images.ahead([image_row for image_row, _, _ in pairs])

    def __getitem__(self, pair: tuple[int, int, Any]) -> tuple[Tensor, Tensor]:
        image_row, caption_row, region = pair
        pixels = torch.from_numpy(self._images.shown(image_row, region))
        return pixels, self._tokenizer([self._texts[caption_row].as_py()])[0]


class _Items(Dataset[Any]):
    """The same items, with an error as an item: a worker's exception would lose its class and its one line."""

    def __init__(self, dataset: _ReadAhead) -> None:
        self._dataset = dataset

    def __getitem__(self, index: Any) -> Any:
        try:
            return self._dataset[index]
        except (OSError, CacheError) as error:
            return error

    def __getitems__(self, indices: list[Any]) -> list[Any]:
        # what DataLoader calls for a batch: pictures behind a URL come together
        with self._dataset.ahead(indices):
            return [self[index] for index in indices]


def _collate(items: list[Any]) -> Any:
    return next((item for item in items if isinstance(item, Exception)), None) or default_collate(items)


def load_items(dataset: _ReadAhead, workers: int | None, device: torch.device, **how: Any) -> Iterator[Any]:
    """Batches of a dataset, made by ``workers`` processes (0: this one).

    Args:
        workers: left out (None) half the cores, at most 8; the step needs the others.
        how: batch_size and sampler, or batch_sampler, as DataLoader takes them.

    Raises:
        OSError, CacheMismatchError: what the first bad item of a batch raised, wherever it was made.
    """
    loader = DataLoader(
        _Items(dataset),
        num_workers=min(8, (os.cpu_count() or 1) // 2) if workers is None else workers,
        collate_fn=_collate,
        pin_memory=device.type == "cuda",
        worker_init_fn=_one_thread,
        **how,
    )
    for batch in loader:
        if isinstance(batch, Exception):
            raise batch
        yield batch


def _one_thread(worker: int) -> None:
    torch.set_num_threads(1)  # a worker decodes one image at a time; more threads fight with the step


class _PairSampler:
    """Hands the DataLoader batches of (image row, caption row, what to see of the image), and remembers none of them.

    It runs in the main process, so that workers need no reader.

    Args:
        regions: what to see of the images of some pairs.
    """

    def __init__(self, pairs: Iterable[Pairs], regions: Callable[[Pairs], Sequence[Any]]) -> None:
        self._pairs, self._regions = pairs, regions

    def __iter__(self) -> Iterator[list[tuple[int, int, Any]]]:
        for pair in self._pairs:
            regions = self._regions(pair)
            yield list(zip(pair.image_rows.tolist(), pair.caption_rows.tolist(), regions, strict=True))


def epoch_inputs(
    reader: EmbeddingReader,
    source: ImageSource,
    preprocess: Preprocess,
    tokenizer: Tokenizer,
    pairs: Iterable[Pairs],
    workers: int | None,
    device: torch.device,
    pixels: ReadyPixels | None = None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """(pixels, tokens) for each of ``pairs``, in their order; see :func:`load_items`.

    The pixels are of the very region that the teacher saw, at the student's resolution. They come from the workers as
    bytes and are normalised on ``device``, where they stay; the tokens are on the CPU.

    Args:
        pixels: take them from here, where they were put earlier, and decode nothing.
    """
    texts = reader.captions["text"]
    if pixels is not None:
        inputs = _StudentInputs(pixels, texts, tokenizer)
        sampler = _PairSampler(pairs, lambda pair: pair.views.tolist())
    else:
        inputs = _StudentInputs(StudentImages(reader, source, preprocess), texts, tokenizer)
        sampler = _PairSampler(pairs, lambda pair: stored_crops(reader, pair.image_rows, pair.views))
    for shown, tokens in load_items(inputs, workers, device, batch_sampler=sampler):
        yield preprocess.normalized_batch(shown.to(device, non_blocking=True)), tokens
