"""What a student is shown: pixels and tokens of its batches, made by processes that stay for a whole run."""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from pipeline.batches import Pairs, stored_crops
from pipeline.cached_images import CachedImages
from pipeline.decode import UndecodableImageError
from pipeline.pixels import ReadyPixels
from pipeline.preprocess import Preprocess
from pipeline.samples import ImageSource
from pipeline.scaled_jpeg import open_image
from pipeline.views import Crop, crop_shown
from storage.errors import CacheError
from storage.reader import EmbeddingReader

__all__ = ["InputLoader", "StudentImages"]

Tokenizer = Callable[[list[str]], Tensor]


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


class _StudentInputs(Dataset[Any]):
    """By (image row, caption row, what to see of the image) what is shown, uint8 (height, width, 3), and token ids.

    By an image row alone the pixels of its evaluation crop; a batch is of the one kind or the other.

    Args:
        images: for evaluation crops; None where none is wanted.
        shown: give what is shown of an image row, and what to see of it.
    """

    def __init__(
        self, images: StudentImages | None, shown: _ShownImages, texts: pa.ChunkedArray, tokenizer: Tokenizer
    ) -> None:
        self._images, self._shown, self._texts, self._tokenizer = images, shown, texts, tokenizer

    def ahead(self, keys: Sequence[tuple[int, int, Any] | int]) -> AbstractContextManager[None]:
        """See :meth:`pipeline.cached_images.CachedImages.ahead`."""
        images = self._evaluated() if isinstance(keys[0], int) else self._shown
        return images.ahead([key if isinstance(key, int) else key[0] for key in keys])

    def _evaluated(self) -> StudentImages:
        if self._images is None:
            raise ValueError("evaluation crops are asked for, and this was made for pairs alone")
        return self._images

    def __getitem__(self, key: tuple[int, int, Any] | int) -> tuple[Tensor, Tensor] | Tensor:
        if isinstance(key, int):
            return self._evaluated()[key]
        image_row, caption_row, region = key
        pixels = torch.from_numpy(self._shown.shown(image_row, region))
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
        pixels: take the pixels of pairs from here, where they were put earlier, and decode none of them.
        evaluates: whether :meth:`evaluation_crops` will be asked for, which are decoded in any case.
        workers: processes that decode (0: none but this one); left out (None) half the cores, at most 8, since the step
            needs the others.
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
        evaluates: bool = True,
    ) -> None:
        self._reader, self._preprocess, self._device, self._pixels = reader, preprocess, device, pixels
        self.tokenizer = tokenizer
        texts = reader.captions["text"]
        if pixels is not None and not evaluates:
            inputs = _StudentInputs(None, pixels, texts, tokenizer)
        else:
            images = StudentImages(reader, source, preprocess)
            inputs = _StudentInputs(images, images if pixels is None else pixels, texts, tokenizer)
        self._asked = _Asked()
        self._loader: DataLoader[Any] | None = _loader(inputs, self._asked, workers, device)
        self._current: Generator[Any] | None = None

    def epoch(self, pairs: Iterable[Pairs]) -> Iterator[tuple[Tensor, Tensor]]:
        """(pixels, tokens) for each of ``pairs``, in their order. It ends early when another iteration begins.

        The pixels are of the very region that the teacher saw, at the student's resolution. They come from the workers
        as bytes and are normalised on the device, where they stay; the tokens are on the CPU.

        Raises:
            OSError, CacheMismatchError: what the first bad item of a batch raised, wherever it was made.
        """
        for shown, tokens in self._begun(self._keys(pair) for pair in pairs):
            yield self._preprocess.normalized_batch(shown.to(self._device, non_blocking=True)), tokens

    def evaluation_crops(self, rows: NDArray[np.int64], batch_size: int) -> Iterator[Tensor]:
        """The pixels of some images in their order, float32 (batch_size or less, 3, height, width), on the CPU.

        It ends early when another iteration begins.

        Raises:
            OSError, CacheMismatchError: as :meth:`epoch`.
        """
        yield from self._begun(rows[at : at + batch_size].tolist() for at in range(0, len(rows), batch_size))

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

    def _keys(self, pair: Pairs) -> list[tuple[int, int, Any]]:
        if self._pixels is not None:
            regions: Sequence[Any] = pair.views.tolist()
        else:
            regions = stored_crops(self._reader, pair.image_rows, pair.views)
        return list(zip(pair.image_rows.tolist(), pair.caption_rows.tolist(), regions, strict=True))

    def close(self) -> None:
        """End the processes, and an iteration that somebody still holds."""
        self._end_iteration()
        self._loader = None
