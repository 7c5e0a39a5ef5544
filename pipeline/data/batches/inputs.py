"""Pixels and tokens of batches, prepared by worker processes that serve a whole run."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import chain
from multiprocessing import connection
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from teacher_cache.pipeline.data.batches.cached_samples import CachedSamples
from teacher_cache.pipeline.data.batches.pairs import Pairs, stored_crops
from teacher_cache.pipeline.data.batches.ready_pixels import PixelFiles, ReadyPixels
from teacher_cache.pipeline.data.batches.student_images import StudentImages
from teacher_cache.pipeline.data.cores import loader_workers
from teacher_cache.pipeline.data.service.fork_server import start_fork_server
from teacher_cache.storage.errors import CacheError
from teacher_cache.storage.files.location import results_ahead
from teacher_cache.storage.read.reader import EmbeddingReader

_ROWS_AHEAD = 16_384  # three seconds at 5,000 rows/s: enough to read the tables of a new window

Tokenizer = Callable[[list[str]], Any]


class _Key(NamedTuple):
    """Item of a batch, looked up in the cache's tables.

    Attributes:
        image, region: arguments of the images' ``shown``.
        texts: captions of the image. None: an evaluation crop without captions.
    """

    image: Any
    region: Any
    texts: list[str] | None


class _Inputs(Dataset[Any]):
    """Items by key. Workers hold no table and no reader."""

    def __init__(
        self, learned: StudentImages | PixelFiles, evaluated: StudentImages | None, tokenizer: Tokenizer
    ) -> None:
        self._learned: Any = learned
        self._evaluated, self._tokenizer = evaluated, tokenizer

    def __getitems__(self, keys: list[_Key]) -> list[Any]:
        """Return the items of a batch. Errors are returned as items: a worker's exception would lose its class."""
        images: Any = self._learned if keys[0].texts is not None else self._evaluated
        try:
            with images.ahead([key.image for key in keys]):
                return [self._item(key) for key in keys]
        except (OSError, CacheError) as error:
            return [error]

    def _item(self, key: _Key) -> Any:
        if key.texts is None:
            assert self._evaluated is not None  # checked in evaluation_crops
            return self._evaluated.see(key.image)
        tokens = self._tokenizer(key.texts) if key.texts else torch.zeros(0, 1, dtype=torch.int64)
        return torch.from_numpy(self._learned.shown(key.image, key.region)), tokens


def _collate(items: list[Any]) -> Any:
    return items[0] if isinstance(items[0], Exception) else default_collate(items)


class _Batches:
    """Keys of the current iteration, which the loader takes in this process."""

    def __init__(self) -> None:
        self.keys: Iterable[list[_Key]] = ()

    def __iter__(self) -> Iterator[list[_Key]]:
        return iter(self.keys)


@contextmanager
def _hidden_main() -> Iterator[None]:
    """Keep new processes from running the user's script again. They need nothing from it."""
    main = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


def _start_worker(worker: int) -> None:
    torch.set_num_threads(1)  # a worker decodes one image at a time; more threads compete with the training step
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes; the parent ends this one
    threading.Thread(target=_end_with_training, name="end with training", daemon=True).start()


def _end_with_training() -> None:
    """End this worker when the training process is killed. Its own parent, the fork server, would live on with it."""
    training = multiprocessing.parent_process()
    assert training is not None  # a worker has one
    connection.wait([training.sentinel])
    os._exit(1)


def _loader(dataset: _Inputs, batches: _Batches, workers: int | None, device: torch.device) -> DataLoader[Any]:
    workers = loader_workers(device.type == "cuda") if workers is None else workers
    return DataLoader(
        dataset,
        batch_sampler=batches,
        num_workers=workers,
        collate_fn=_collate,
        # at most 16 batches: containers have little shared memory, and one of 1,024 pictures takes 154 MB
        prefetch_factor=None if workers == 0 else 2 if workers <= 8 else 1,
        pin_memory=device.type == "cuda",
        worker_init_fn=_start_worker,
        persistent_workers=workers > 0,
        multiprocessing_context=start_fork_server() if workers > 0 else None,
    )


class InputLoader:
    """Loader of a run's images and captions, with worker processes for all its epochs and measurements.

    Args:
        learned: images of training pairs.
        evaluated: images of :meth:`evaluation_crops`, or None.
        workers: number of processes that decode; 0 decodes in this process. Default:
            :func:`teacher_cache.pipeline.data.cores.loader_workers`.
        window_chunks: number of chunks in a shuffle window. Table rows of two windows are kept in memory.
    """

    def __init__(
        self,
        reader: EmbeddingReader,
        tokenizer: Tokenizer,
        learned: StudentImages | ReadyPixels,
        evaluated: StudentImages | None = None,
        workers: int | None = None,
        device: torch.device | None = None,
        window_chunks: int = 16,
    ) -> None:
        self.tokenizer = tokenizer
        self._reader, self._learned, self._evaluates = reader, learned, evaluated is not None
        self._device = device or torch.device("cpu")
        # a batch may span two windows
        self._samples = CachedSamples(reader, 2 * window_chunks)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="inputs")
        self._batches = _Batches()
        made_of = learned.files if isinstance(learned, ReadyPixels) else learned
        inputs = _Inputs(made_of, evaluated, tokenizer)
        self._loader: DataLoader[Any] | None = _loader(inputs, self._batches, workers, self._device)
        self._current: Generator[Any] | None = None

    def epoch(self, pairs: Iterable[Pairs]) -> Generator[tuple[Tensor, Tensor]]:
        """Yield (pixels, tokens) of each batch, in order. The iteration ends early when another one begins.

        The pixels show the region that the teacher saw, at the student's resolution. Workers send them as bytes; they
        are normalised on the device and stay there. The tokens, (batch, captions, length), are on the CPU.

        Raises:
            OSError, CacheError: an item of the batch cannot be made. Every process raises the first item's error.
        """
        for shown, tokens in self._started(self._looked_up(pairs)):
            yield self._learned.preprocess.normalized_batch(shown.to(self._device, non_blocking=True)), tokens

    def evaluation_crops(self, rows: NDArray[np.int64], batch_size: int) -> Iterator[Tensor]:
        """Yield the pixels of images in order, float32 (batch_size or less, 3, height, width), on the CPU.

        The iteration ends early when another one begins.

        Raises:
            OSError, CacheError: as :meth:`epoch`.
            ValueError: this loader has no images to evaluate.
        """
        if not self._evaluates:
            raise ValueError("evaluation crops are asked for: give InputLoader evaluated, their images")
        parts = (rows[at : at + batch_size] for at in range(0, len(rows), batch_size))
        yield from self._started(results_ahead(self._thread, self._evaluation_keys, parts, ahead=1))

    def _started(self, keys: Iterable[list[_Key]]) -> Generator[Any]:
        """Start an iteration and end the previous one: the workers serve one at a time."""
        if self._loader is None:
            raise ValueError("this loader is closed, and its processes have ended: make another one")
        self._end_iteration()
        self._batches.keys = keys
        self._current = _made(self._loader)
        return self._current

    def _end_iteration(self) -> None:
        if self._current is not None:
            self._current.close()
            self._current = None

    def _looked_up(self, pairs: Iterable[Pairs]) -> Iterator[list[_Key]]:
        """Yield the keys of each batch, which a thread looks up ahead.

        Without it, the training step would wait for the first batch of each window, whose chunks are all new.
        """
        coming = iter(pairs)
        for first in coming:  # all batches have its length
            ahead = _ROWS_AHEAD // len(first.image_rows)
            yield from results_ahead(self._thread, self._keys, chain([first], coming), ahead)

    def _keys(self, pairs: Pairs) -> list[_Key]:
        images: Sequence[Any]
        regions: Sequence[Any]
        if isinstance(self._learned, ReadyPixels):
            images, regions = self._learned.places(pairs.image_rows, pairs.views), [None] * len(pairs.image_rows)
        else:
            images = self._samples.records(pairs.image_rows)
            regions = stored_crops(self._reader, pairs.image_rows, pairs.views)
        flat, count = self._samples.texts(pairs.image_rows, pairs.caption_rows), pairs.caption_rows.shape[1]
        texts = [flat[image * count : (image + 1) * count] for image in range(len(images))]
        return [_Key(*key) for key in zip(images, regions, texts, strict=True)]

    def _evaluation_keys(self, rows: NDArray[np.int64]) -> list[_Key]:
        return [_Key(image, None, None) for image in self._samples.records(rows)]

    def close(self) -> None:
        """End the worker processes and any open iteration."""
        self._end_iteration()
        self._loader = None
        self._thread.shutdown(cancel_futures=True)


def _made(loader: DataLoader[Any]) -> Generator[Any]:
    with _hidden_main():
        batches = iter(loader)  # the first call starts the processes
    for batch in batches:
        if isinstance(batch, Exception):
            raise batch
        yield batch
