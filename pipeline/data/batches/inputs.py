"""Pixels and tokens of batches, prepared by the decode service for a whole run."""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from functools import cached_property
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from teacher_cache.pipeline.data.batches.cached_samples import CachedSamples
from teacher_cache.pipeline.data.batches.pairs import Pairs, stored_crops
from teacher_cache.pipeline.data.batches.student_images import StudentImages
from teacher_cache.pipeline.data.batches.student_inputs import BatchForm, Key, StudentInputs
from teacher_cache.pipeline.data.cores import decode_threads, loader_workers
from teacher_cache.pipeline.data.images.preprocess import Preprocess
from teacher_cache.pipeline.data.images.ready_pixels import ReadyPixels
from teacher_cache.pipeline.data.service.pinned import Copied, CopyStream, pinned_for
from teacher_cache.pipeline.data.service.service import (
    IMAGES_PER_TICKET,
    DecodeProcesses,
    DecodeService,
    DecodeThreads,
    when_all_done,
)
from teacher_cache.pipeline.data.service.slots import Slot, Slots
from teacher_cache.storage.files.location import begun_ahead, results_ahead
from teacher_cache.storage.read.reader import EmbeddingReader

_ROWS_AHEAD = 16_384  # three seconds at 5,000 rows/s: enough to read the tables of a new window
_BATCHES_AHEAD = 3

Tokenizer = Callable[[list[str]], Any]


class _Requested(NamedTuple):
    """Batch that the service prepares in a slot."""

    form: BatchForm
    slot: Slot
    rows: int
    jobs: list[Future[list[Any]]]

    def done(self) -> None:
        """Wait until it is prepared.

        Raises:
            OSError, CacheError: an item cannot be made; the first one's error.
        """
        for job in self.jobs:
            job.result()

    def leave(self, give_back: Callable[[Slot], None]) -> None:
        """Cancel it without a wait. Its slot is given back when the jobs that have begun are done."""
        for job in self.jobs:
            job.cancel()
        when_all_done(self.jobs, lambda: give_back(self.slot))


class InputLoader:
    """Loader of a run's images and captions, by processes that stay for all its epochs and measurements.

    Iterations may be open side by side: a measurement takes its turn among the batches of an epoch that were
    requested before.

    Args:
        learned: images of training pairs.
        evaluated: images of :meth:`evaluation_crops`, or None.
        workers: number of processes that decode; 0: threads of this process. Default:
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
        self._reader, self._learned, self._evaluated = reader, learned, evaluated
        self._device = device or torch.device("cpu")
        self._workers = loader_workers(self._device.type == "cuda") if workers is None else workers
        # a batch may span two windows
        self._samples = CachedSamples(reader, 2 * window_chunks)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="inputs")
        self._slots = Slots(pinned_for(self._device))
        self._copies = CopyStream(self._device)
        self._copied: deque[tuple[Copied, Slot]] = deque()
        self._service: DecodeService | None = None
        self._closed = False

    def epoch(self, pairs: Iterable[Pairs]) -> Generator[tuple[Tensor, Tensor]]:
        """Yield (pixels, tokens) of each batch, in order. Close the generator to stop prefetching.

        The pixels show the region that the teacher saw, at the student's resolution. Workers write them as bytes; they
        are normalised on the device and stay there. The tokens, (batch, captions, length), are on the CPU.

        Raises:
            OSError, CacheError: an item of the batch cannot be made. Every process raises the first item's error.
        """
        preprocess = self._learned.preprocess
        with closing(self._made(self._looked_up(pairs), preprocess.size)) as batches:
            for batch in batches:
                tokens = torch.from_numpy(batch.form.tokens(self._slots, batch.slot, batch.rows)).clone()
                yield self._pixels(batch, preprocess), tokens

    def evaluation_crops(self, rows: NDArray[np.int64], batch_size: int) -> Generator[Tensor]:
        """Yield the pixels of images in order, float32 (batch_size or less, 3, height, width), on the device.

        Raises:
            OSError, CacheError: as :meth:`epoch`.
            ValueError: this loader has no images to evaluate.
        """
        if self._evaluated is None:
            raise ValueError("evaluation crops are asked for: give InputLoader evaluated, their images")
        preprocess = self._evaluated.preprocess
        parts = (rows[at : at + batch_size] for at in range(0, len(rows), batch_size))
        keys = results_ahead(self._thread, self._evaluation_keys, parts, ahead=1)
        with closing(self._made(keys, preprocess.size)) as batches:
            for batch in batches:
                yield self._pixels(batch, preprocess)

    def _made(self, keys: Iterable[list[Key]], size: tuple[int, int]) -> Generator[_Requested]:
        """Yield batches in order as they are prepared, with the next ones requested. The caller gives the slots back.

        All batches but the last have the same number of rows.
        """
        service, requested = self._started(), deque[_Requested]()
        form: BatchForm | None = None

        def request(keys: list[Key]) -> _Requested:
            nonlocal form
            form = form or BatchForm(len(keys), size, len(keys[0].texts or ()), self._token_length)
            requested.append(self._requested(service, form, keys))
            return requested[-1]

        try:
            for batch in begun_ahead(request, keys, _BATCHES_AHEAD):
                batch.done()
                yield requested.popleft()
        finally:
            for batch in requested:
                batch.leave(self._slots.give_back)

    def _requested(self, service: DecodeService, form: BatchForm, keys: list[Key]) -> _Requested:
        slot = self._slots.take(form.nbytes)
        items = form.items(keys, slot)
        # the remote images of a ticket are fetched together; a small batch is shared out too
        size = min(IMAGES_PER_TICKET, -(-len(items) // (self._workers or decode_threads())))
        jobs = [service.submit(items[at : at + size]) for at in range(0, len(items), size)]
        return _Requested(form, slot, len(keys), jobs)

    def _started(self) -> DecodeService:
        """Return the service, started when the first batch is asked for."""
        if self._closed:
            raise ValueError("this loader is closed, and its processes have ended: make another one")
        if self._service is None:
            learned = self._learned.files if isinstance(self._learned, ReadyPixels) else self._learned.without_torch()
            evaluated = None if self._evaluated is None else self._evaluated.without_torch()
            inputs = StudentInputs(learned, evaluated, self.tokenizer, self._token_length)
            if self._workers:
                self._service = DecodeProcesses(inputs, self._slots, self._workers)
            else:
                self._service = DecodeThreads(inputs, self._slots, decode_threads())
            # threads hold the service: a loader that nobody closes ends its processes when it goes
            weakref.finalize(self, self._service.close)
        return self._service

    def _pixels(self, batch: _Requested, preprocess: Preprocess) -> Tensor:
        """Return the pixels of a prepared batch, normalised on the device, and give its slot back."""
        moved, copied = self._copies.copied(torch.from_numpy(batch.form.pixels(self._slots, batch.slot, batch.rows)))
        pixels = preprocess.normalized_batch(moved)
        self._give_back(batch.slot, copied)
        return pixels

    def _give_back(self, slot: Slot, copied: Copied | None) -> None:
        """Give a slot back once the device has its pixels."""
        if copied is None:
            self._slots.give_back(slot)
            return
        self._copied.append((copied, slot))
        while self._copied and self._copied[0][0].query():
            self._slots.give_back(self._copied.popleft()[1])

    @cached_property
    def _token_length(self) -> int:
        return int(np.asarray(self.tokenizer([""])).shape[1])

    def _looked_up(self, pairs: Iterable[Pairs]) -> Iterator[list[Key]]:
        """Yield the keys of each batch, which a thread looks up ahead.

        Without it, the training step would wait for the first batch of each window, whose chunks are all new.
        """
        coming = iter(pairs)
        for first in coming:  # all batches have its length
            ahead = _ROWS_AHEAD // len(first.image_rows)
            yield from results_ahead(self._thread, self._keys, chain([first], coming), ahead)

    def _keys(self, pairs: Pairs) -> list[Key]:
        images: Sequence[Any]
        regions: Sequence[Any]
        if isinstance(self._learned, ReadyPixels):
            images, regions = self._learned.places(pairs.image_rows, pairs.views), [None] * len(pairs.image_rows)
        else:
            images = self._samples.records(pairs.image_rows)
            regions = stored_crops(self._reader, pairs.image_rows, pairs.views)
        flat, count = self._samples.texts(pairs.image_rows, pairs.caption_rows), pairs.caption_rows.shape[1]
        texts = [flat[image * count : (image + 1) * count] for image in range(len(images))]
        return [Key(*key) for key in zip(images, regions, texts, strict=True)]

    def _evaluation_keys(self, rows: NDArray[np.int64]) -> list[Key]:
        return [Key(image, None, None) for image in self._samples.records(rows)]

    def close(self) -> None:
        """End the worker processes."""
        if self._closed:
            return
        self._closed = True
        if self._service is not None:
            self._service.close()
        self._thread.shutdown(cancel_futures=True)
        self._slots.close()
