"""What a student is shown: pixels and tokens of its batches, made by processes that stay for a whole run."""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from itertools import chain
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from teacher_cache.pipeline.data.batches.cached_samples import CachedSamples, SampleRecord
from teacher_cache.pipeline.data.batches.pairs import Pairs, stored_crops
from teacher_cache.pipeline.data.batches.ready_pixels import ReadyPixels
from teacher_cache.pipeline.data.batches.stored_images import StoredImages
from teacher_cache.pipeline.data.batches.tokens import by_words
from teacher_cache.pipeline.data.datasets.samples import ImageSource
from teacher_cache.pipeline.data.images.decode import UndecodableImageError
from teacher_cache.pipeline.data.images.preprocess import Preprocess
from teacher_cache.pipeline.data.images.scaled_jpeg import open_image
from teacher_cache.pipeline.data.images.views import Crop, crop_shown
from teacher_cache.storage.errors import CacheError
from teacher_cache.storage.files.location import results_ahead
from teacher_cache.storage.read.reader import EmbeddingReader

__all__ = ["InputLoader", "StudentImages"]

_ROWS_AHEAD = 16_384  # at 5,000 a second three seconds, in which the tables of a new window are read

Tokenizer = Callable[[list[str]], Tensor]


class StudentImages:
    """An image of the cache to the pixels that a model sees of it. Decoded as the cache says; holds no table.

    Args:
        reader: of the cache.
        source: where the images are.
        preprocess: the model's.

    Raises:
        UsageError: the decoder needs a package that is not installed.

    Raises on access:
        OSError: the image cannot be read where the source says.
        CacheMismatchError: it is there and is not the image that the teacher saw.
    """

    def __init__(self, reader: EmbeddingReader, source: ImageSource, preprocess: Preprocess) -> None:
        self._images = StoredImages(source)
        self._preprocess = preprocess.decoded_by(reader.manifest.identity.preprocess.decoder)
        self._shown = self._preprocess.shown()

    def ahead(self, images: Sequence[SampleRecord]) -> AbstractContextManager[None]:
        """See :meth:`teacher_cache.pipeline.data.batches.stored_images.StoredImages.ahead`."""
        return self._images.ahead(images)

    def see(self, image: SampleRecord, crop: Crop | None = None) -> Tensor:
        """Float32 (3, height, width) of a crop, at the model's own resolution; for None its evaluation crop."""
        return self._preprocess.normalized(self.shown(image, crop))

    def shown(self, image: SampleRecord, crop: Crop | None) -> NDArray[np.uint8]:
        """What :meth:`see` normalises: RGB uint8 (height, width, 3)."""
        return self.each_shown(image, [crop])[0]

    def each_shown(self, image: SampleRecord, crops: Sequence[Crop | None]) -> list[NDArray[np.uint8]]:
        """:meth:`shown` of several crops of an image that is decoded once."""
        data = self._images.read(image)
        try:
            decoded = open_image(data, self._preprocess.decoder)
            return [
                self._shown(decoded) if crop is None else crop_shown(decoded, crop, self._preprocess) for crop in crops
            ]
        except (UndecodableImageError, ArithmeticError, ValueError, RuntimeError) as error:
            raise OSError(
                f"{self._images.named(image)} cannot be decoded here, though the teacher saw it: {error}"
            ) from error


class _ShownImages(Protocol):
    """Images of the cache, each by what says which it is, to what a student sees of some region of it."""

    def ahead(self, images: Sequence[Any], /) -> AbstractContextManager[None]:
        """See :meth:`teacher_cache.pipeline.data.batches.stored_images.StoredImages.ahead`."""

    def shown(self, image: Any, region: Any, /) -> NDArray[np.uint8]:
        """RGB uint8 (height, width, 3), writable."""


class _Pair(NamedTuple):
    """What a worker makes an image and its captions of."""

    image: Any
    region: Any
    texts: list[str]


class _StudentInputs(Dataset[Any]):
    """By a pair what is shown, uint8 (height, width, 3), and token ids, (captions, length).

    By a record the pixels of its evaluation crop. A batch is of the one kind or the other. Nothing is looked up here:
    workers need no table of the cache.

    Args:
        images: for evaluation crops; None where none is wanted.
        shown: give what is shown of an image and a region.
    """

    def __init__(self, images: StudentImages | None, shown: _ShownImages, tokenizer: Tokenizer) -> None:
        self._images, self._shown, self._tokenizer = images, shown, tokenizer

    def ahead(self, keys: Sequence[_Pair | SampleRecord]) -> AbstractContextManager[None]:
        """See :meth:`teacher_cache.pipeline.data.batches.stored_images.StoredImages.ahead`."""
        images = self._evaluated() if isinstance(keys[0], SampleRecord) else self._shown
        return images.ahead([key if isinstance(key, SampleRecord) else key.image for key in keys])

    def _evaluated(self) -> StudentImages:
        if self._images is None:
            raise ValueError("evaluation crops are asked for: give InputLoader evaluated, their preprocessing")
        return self._images

    def __getitem__(self, key: _Pair | SampleRecord) -> tuple[Tensor, Tensor] | Tensor:
        if isinstance(key, SampleRecord):
            return self._evaluated().see(key)
        return torch.from_numpy(self._shown.shown(key.image, key.region)), self._tokenizer(key.texts)


class _ReadAhead(Protocol):
    """Items by a key, and a way to say which are wanted next."""

    def ahead(self, keys: Sequence[Any], /) -> AbstractContextManager[None]:
        """See :meth:`teacher_cache.pipeline.data.batches.stored_images.StoredImages.ahead`."""

    def __getitem__(self, key: Any, /) -> Any: ...


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


class _Asked:
    """The batches of keys that are wanted now. The loader takes them in this process: workers need no reader."""

    def __init__(self) -> None:
        self.batches: Iterable[list[Any]] = ()

    def __iter__(self) -> Iterator[list[Any]]:
        return iter(self.batches)


def _loader(
    dataset: _ReadAhead, batches: Iterable[list[Any]], workers: int | None, device: torch.device
) -> DataLoader[Any]:
    workers = min(8, (os.cpu_count() or 1) // 2) if workers is None else workers
    return DataLoader(
        _Items(dataset),
        batch_sampler=batches,
        num_workers=workers,
        collate_fn=_collate,
        pin_memory=device.type == "cuda",
        worker_init_fn=_one_thread,
        persistent_workers=workers > 0,
    )


def _batches(loader: DataLoader[Any]) -> Generator[Any]:
    for batch in loader:
        if isinstance(batch, Exception):
            raise batch
        yield batch


def _one_thread(worker: int) -> None:
    torch.set_num_threads(1)  # a worker decodes one image at a time; more threads fight with the step


class InputLoader:
    """The images and captions of a run, epoch after epoch, made by processes that stay from its first batch on.

    They start while this process is small. Who forks when it has trained already shares its activations with the
    child, and has to copy every page of them that it writes again: seconds in each epoch on a CPU, and twice the
    memory for a while.

    Args:
        preprocess: how the pairs' images are shown.
        pixels: take the pixels of pairs from here, where they were put earlier, and decode none of them.
        evaluated: how those of :meth:`evaluation_crops` are shown, which are decoded in any case; None if none will be
            asked for.
        workers: processes that decode (0: none but this one); left out (None) half the cores, at most 8, since the step
            needs the others.
        window_chunks: of the shuffle that the pairs come from: what the cache knows of so many chunks is kept.
    """

    def __init__(
        self,
        reader: EmbeddingReader,
        source: ImageSource,
        preprocess: Preprocess,
        tokenizer: Tokenizer,
        workers: int | None,
        device: torch.device,
        pixels: ReadyPixels | None = None,
        evaluated: Preprocess | None = None,
        window_chunks: int = 16,
    ) -> None:
        self._reader, self._preprocess, self._device, self._pixels = reader, preprocess, device, pixels
        self.tokenizer = tokenizer
        # a batch may lie in two windows
        self._samples = CachedSamples(reader, 2 * window_chunks)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="inputs")
        images = None if evaluated is None else StudentImages(reader, source, evaluated)
        shown = StudentImages(reader, source, preprocess) if pixels is None else pixels
        inputs = _StudentInputs(images, shown, by_words(tokenizer))
        self._asked = _Asked()
        self._loader: DataLoader[Any] | None = _loader(inputs, self._asked, workers, device)
        self._current: Generator[Any] | None = None

    def epoch(self, pairs: Iterable[Pairs]) -> Iterator[tuple[Tensor, Tensor]]:
        """(pixels, tokens) for each of ``pairs``, in their order. It ends early when another iteration begins.

        The pixels are of the very region that the teacher saw, at the student's resolution. They come from the workers
        as bytes and are normalised on the device, where they stay; the tokens, (batch, captions, length), are on the
        CPU.

        Raises:
            OSError, CacheMismatchError: what the first bad item of a batch raised, wherever it was made.
        """
        for shown, tokens in self._begun(self._looked_up(pairs)):
            yield self._preprocess.normalized_batch(shown.to(self._device, non_blocking=True)), tokens

    def evaluation_crops(self, rows: NDArray[np.int64], batch_size: int) -> Iterator[Tensor]:
        """The pixels of some images in their order, float32 (batch_size or less, 3, height, width), on the CPU.

        It ends early when another iteration begins.

        Raises:
            OSError, CacheMismatchError: as :meth:`epoch`.
        """
        parts = (rows[at : at + batch_size] for at in range(0, len(rows), batch_size))
        yield from self._begun(results_ahead(self._thread, self._samples.records, parts, ahead=1))

    def _begun(self, batches: Iterable[list[Any]]) -> Generator[Any]:
        """An iteration over these; the one before it is over, since the processes serve one."""
        if self._loader is None:
            raise ValueError("this loader is closed, and its processes have ended: make another one")
        self._end_iteration()
        self._asked.batches = batches
        self._current = _batches(self._loader)
        return self._current

    def _end_iteration(self) -> None:
        if self._current is not None:
            self._current.close()
            self._current = None

    def _looked_up(self, pairs: Iterable[Pairs]) -> Iterator[list[_Pair]]:
        """The keys of each of ``pairs``, those of the next ones being looked up by a thread of its own, in order.

        A window's first batch is of chunks that are all new, for which the step would otherwise wait.
        """
        coming = iter(pairs)
        for first in coming:  # the others are as long
            ahead = _ROWS_AHEAD // len(first.image_rows)
            yield from results_ahead(self._thread, self._keys, chain([first], coming), ahead)

    def _keys(self, pair: Pairs) -> list[_Pair]:
        if self._pixels is not None:
            images: Sequence[Any] = pair.image_rows.tolist()
            regions: Sequence[Any] = pair.views.tolist()
        else:
            images = self._samples.records(pair.image_rows)
            regions = stored_crops(self._reader, pair.image_rows, pair.views)
        flat, each = self._samples.texts(pair.image_rows, pair.caption_rows), pair.caption_rows.shape[1]
        texts = [flat[at : at + each] for at in range(0, len(flat), each)]
        return [_Pair(*key) for key in zip(images, regions, texts, strict=True)]

    def close(self) -> None:
        """End the processes, and an iteration that somebody still holds."""
        self._end_iteration()
        self._loader = None
        self._thread.shutdown(cancel_futures=True)
