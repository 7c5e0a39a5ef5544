"""Encode chunks of a planned cache: decode, run the teacher, write and commit; alone or with other processes.

Decoding (threads), the teacher (this thread) and writing (one thread, two to a store) overlap, across chunk borders
too; a GPU has its next batch before anybody looks at the embeddings of the last one. What a batch holds depends only on
the chunk that it is of, never on what else is pending, so that an interrupted and resumed run writes the very bytes of
an unbroken one.

Rows that are known already (``teacher_cache.pipeline.precompute.reuse``) are taken as they are: the teacher never sees
them, and of their images at most the size is looked at. The other rows of such a chunk share batches.
"""

from __future__ import annotations

import logging
import os
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from teacher_cache.pipeline.data.datasets.records import data_folder
from teacher_cache.pipeline.data.datasets.samples import DatasetSpec, ImageSource, require_content
from teacher_cache.pipeline.data.images.decode import UndecodableImageError, decoded_size
from teacher_cache.pipeline.data.images.scaled_jpeg import open_image
from teacher_cache.pipeline.data.images.views import crop_shown, draw_crop
from teacher_cache.pipeline.data.tokens import order_by_length
from teacher_cache.pipeline.models.device import keep_freed_memory
from teacher_cache.pipeline.models.teacher import Encoded, LiveTeacher
from teacher_cache.pipeline.precompute.plan import Progress
from teacher_cache.pipeline.precompute.reuse import KnownRows, known_rows
from teacher_cache.pipeline.precompute.row_tally import RowTally
from teacher_cache.pipeline.settings.precompute import PrecomputeConfig
from teacher_cache.storage.files.location import requests_at_once
from teacher_cache.storage.format.arrays import ARRAYS, array_dtype, chunk_shape
from teacher_cache.storage.format.commits import ChunkRef, QuarantinedRow
from teacher_cache.storage.format.journal import ChunkCost
from teacher_cache.storage.format.layout import SCALE, Tower
from teacher_cache.storage.format.table_rows import TableRows
from teacher_cache.storage.observe.logs import event, logger
from teacher_cache.storage.observe.telemetry import telemetry
from teacher_cache.storage.write.claims import Claims
from teacher_cache.storage.write.writer import EmbeddingWriter

__all__ = ["encode_chunks", "encode_shared"]

_LOG = logger("precompute")
_BATCHES_AHEAD = 4
_WRITES_AHEAD = 2
_BATCHES_BEHIND = {"cuda": 1}  # by device: on their way back while the next one is launched
_OTHERS_POLL_SECONDS = 0.5


def encode_chunks(
    config: PrecomputeConfig, teacher: LiveTeacher, refs: Sequence[ChunkRef], progress: Progress | None = None
) -> None:
    """Encode some chunks of a planned cache. When it returns, each of them is committed.

    An image that cannot be decoded quarantines its row and is named in the chunk's commit.
    """
    writer = EmbeddingWriter(config.cache)
    teacher.require(writer.manifest.identity, config.cache)
    _encode(config, teacher, writer, refs, RowTally(writer.manifest.layout, refs, progress))


def encode_shared(
    config: PrecomputeConfig,
    teacher: LiveTeacher,
    refs: Sequence[ChunkRef],
    progress: Progress | None = None,
    known: KnownRows | None = None,
    writer: EmbeddingWriter | None = None,
) -> int:
    """As :func:`encode_chunks`, together with every other process that does the same on this cache.

    When it returns each chunk is committed, by whomever. Chunks of a process that died are taken over.

    Args:
        known: rows that are not encoded but written as they are; those of ``config.reuse`` if left out.
        writer: of this cache, for who calls again and again: what it has read of the tables serves the next call.

    Returns:
        How many of them this process encoded.
    """
    writer = writer or EmbeddingWriter(config.cache)
    teacher.require(writer.manifest.identity, config.cache)
    known = known or known_rows(config.reuse, writer)
    tally = RowTally(writer.manifest.layout, refs, progress)
    # found damaged, so that a commit record says nothing about these
    damaged = writer.committed(refs)
    encoded: set[ChunkRef] = set()

    def done(ref: ChunkRef) -> bool:
        return ref in encoded or (writer.is_sound(ref) if ref in damaged else writer.is_committed(ref))

    with tally, Claims(writer.files) as claims:
        left = list(refs)
        while left:
            mine: list[ChunkRef] = []

            def take(mine: list[ChunkRef] = mine, left: list[ChunkRef] = left) -> Iterator[ChunkRef]:
                for ref in claims.share(left, done):
                    mine.append(ref)
                    yield ref

            _encode(config, teacher, writer, take(), tally, known)
            # of two writers that round otherwise, one's objects may lie beside the other's record
            mixed = {ref for ref in mine if claims.contested(ref.name) and not writer.is_sound(ref)}
            damaged |= mixed
            encoded.update(set(mine) - mixed)
            elsewhere = [ref for ref in left if ref not in encoded and done(ref)]
            tally.add(elsewhere)
            finished = encoded.union(elsewhere)
            left = [ref for ref in left if ref not in finished]
            if left and not mine:
                time.sleep(_OTHERS_POLL_SECONDS)
    return len(encoded)


def _encode(
    config: PrecomputeConfig,
    teacher: LiveTeacher,
    writer: EmbeddingWriter,
    refs: Iterable[ChunkRef],
    tally: RowTally,
    known: KnownRows | None = None,
) -> None:
    keep_freed_memory(teacher.device)
    threads = config.decode_threads or os.cpu_count() or 1
    source = ImageSource(data_folder(DatasetSpec.parse(config.dataset).root))
    writing: deque[Future[Any]] = deque()
    launched: deque[_Launched] = deque()
    remote = requests_at_once(writer.files) > 1
    with (
        ThreadPoolExecutor(threads) as decoders,
        # of a store both chunks that may be on their way are, and the next one is claimed meanwhile
        ThreadPoolExecutor(_WRITES_AHEAD if remote else 1) as writers,
        ThreadPoolExecutor(1) as claimer,
        source.threads(writer.samples.read(range(1))["uri"][0].as_py()) as fetchers,
    ):
        jobs = _Jobs(teacher, writer, source, known, fetchers)

        def finish(one: _Launched) -> None:
            chunk = one.batch.chunk
            one.take(teacher)
            tally.add_rows(chunk.ref, len(one.batch.rows))
            if one.batch.last:
                # so many chunks may wait for the disk before the teacher has to
                while len(writing) >= _WRITES_AHEAD:
                    writing.popleft().result()
                writing.append(writers.submit(chunk.write, writer, teacher))
                telemetry().writing(len(writing))

        try:
            for batch in _ahead(decoders, jobs.batches(_one_ahead(claimer, refs) if remote else refs)):
                launched.append(_launch(teacher, batch))
                while len(launched) > _BATCHES_BEHIND.get(teacher.device.type, 0):
                    finish(launched.popleft())
            while launched:
                finish(launched.popleft())
            while writing:
                writing.popleft().result()
                telemetry().writing(len(writing))
        except BaseException:
            # stop decoding ahead; whole chunks on their way to the disk are still written
            decoders.shutdown(wait=False, cancel_futures=True)
            if fetchers is not None:
                fetchers.shutdown(wait=False, cancel_futures=True)
            telemetry().writing(0)
            raise


class _Launched(NamedTuple):
    """A batch that the teacher was given; a GPU may still be working on it."""

    batch: _Batch
    inputs: Any
    encoded: Encoded | None
    """None of a batch of known rows."""
    decode_wait_seconds: float
    seconds: float

    def take(self, teacher: LiveTeacher) -> None:
        """Put what came of it into its chunk. Raises as :meth:`_Chunk.take`."""
        began = time.perf_counter()
        batch, chunk = self.batch, self.batch.chunk
        chunk.take(teacher, batch, self.inputs, self.encoded)
        # of a GPU what it worked, whatever Python did meanwhile
        on_device = self.encoded.device_seconds() if self.encoded is not None else None
        seconds = self.seconds + time.perf_counter() - began if on_device is None else on_device
        chunk.decode_wait_seconds += self.decode_wait_seconds
        chunk.teacher_seconds += seconds
        of_teacher = None if batch.known else seconds
        telemetry().encoded(chunk.ref.tower, len(batch.rows), self.decode_wait_seconds, of_teacher)


def _launch(teacher: LiveTeacher, batch: _Batch) -> _Launched:
    """Wait for a batch's inputs and give them to the teacher."""
    batch.chunk.start(batch.asked_at)
    waited = time.perf_counter()
    inputs = batch.inputs()
    began = time.perf_counter()
    encoded = batch.chunk.launch(teacher, batch, inputs)
    return _Launched(batch, inputs, encoded, began - waited, time.perf_counter() - began)


@dataclass
class _Chunk:
    """One chunk while it is being encoded."""

    ref: ChunkRef
    rows: range
    arrays: dict[str, NDArray[Any]]
    quarantined: list[QuarantinedRow] = field(default_factory=list)
    crops_known: bool = False
    started: float | None = None
    decode_wait_seconds: float = 0.0
    teacher_seconds: float = 0.0
    encoded_rows: int = 0

    def start(self, at: float) -> None:
        if self.started is None:
            self.started = at

    def launch(self, teacher: LiveTeacher, batch: _Batch, inputs: Any) -> Encoded | None:
        """Have a batch encoded, unless its rows are known."""
        return None if batch.known else self._encoded(teacher, inputs, batch.shown)

    def take(self, teacher: LiveTeacher, batch: _Batch, inputs: Any, encoded: Encoded | None) -> None:
        """Put the embeddings of one batch into their rows; those of known rows are there.

        Raises:
            FloatingPointError: the teacher gives nothing finite for a caption.
        """
        if not len(inputs):
            return
        at = batch.rows - self.rows.start
        lost: list[tuple[str, str] | None] = [None] * len(inputs)
        if self.ref.tower == "image":
            self.arrays["view"][at] = np.array([item.crop for item in inputs], np.float32)
            lost = [item.lost for item in inputs]
        if encoded is not None:
            self.encoded_rows += len(inputs)
            self.arrays["embedding"][at], self.arrays["norm"][at] = encoded.embedding, encoded.norm
        finite = np.isfinite(self.arrays["embedding"][at]).all(axis=1) & np.isfinite(self.arrays["norm"][at])
        decoded = np.array([reason is None for reason in lost])
        if self.ref.tower == "text" and not finite.all():
            raise self._overflow(teacher, int(batch.rows[~finite][0]))
        for index in np.flatnonzero(~decoded | ~finite):
            reason, detail = lost[index] or ("not-finite", "the teacher's features are NaN, infinite or zero")
            row = int(batch.rows[index])
            self.quarantined.append(
                QuarantinedRow(row=row, sample_id=inputs[index].sample_id, reason=reason, detail=detail)
            )
            for values in self.arrays.values():
                values[row - self.rows.start] = np.nan

    def _encoded(self, teacher: LiveTeacher, inputs: Any, shown: torch.Tensor | None) -> Encoded:
        if self.ref.tower == "text":
            return teacher.encode_texts(inputs)
        assert shown is not None
        return teacher.encode_shown(shown)

    def _overflow(self, teacher: LiveTeacher, row: int) -> FloatingPointError:
        return FloatingPointError(
            f"{self.ref.tower} row {row}: the teacher's features are not finite in {teacher.precision}. "
            "Use --precision bf16 or fp32 and a new cache."
        )

    def write(self, writer: EmbeddingWriter, teacher: LiveTeacher) -> None:
        """Commit the chunk.

        Raises:
            FloatingPointError: most of its images came out as nothing finite: the arithmetic's fault, not theirs.
        """
        assert self.started is not None  # the batch that ended the chunk started it
        odd = [row.row for row in self.quarantined if row.reason == "not-finite"]
        if len(odd) > 1 and 2 * len(odd) > len(self.rows) - len(self.quarantined) + len(odd):
            raise self._overflow(teacher, odd[0])
        cost = ChunkCost(
            rows=len(self.rows),
            encoded_rows=self.encoded_rows if self.encoded_rows < len(self.rows) else None,
            seconds=time.perf_counter() - self.started,
            decode_wait_seconds=self.decode_wait_seconds,
            teacher_seconds=self.teacher_seconds,
            device=str(teacher.device),
        )
        began = time.perf_counter()
        writer.write(self.ref, self.arrays, self.quarantined, cost)
        self._tell(cost, time.perf_counter() - began)

    def _tell(self, cost: ChunkCost, write_seconds: float) -> None:
        telemetry().written(self.ref.tower, write_seconds)
        telemetry().bad_samples(Counter(row.reason for row in self.quarantined))
        where = {"chunk": self.ref.name, "rows": [self.rows.start, self.rows.stop]}
        for lost in self.quarantined:
            event(_LOG, logging.WARNING, "row quarantined", chunk=self.ref.name, **lost.model_dump())
        seconds = cost.model_dump(include={"seconds", "decode_wait_seconds", "teacher_seconds"})
        counted = {"quarantined": len(self.quarantined), "write_seconds": write_seconds}
        event(_LOG, logging.INFO, "chunk committed", **where, **seconds, **counted)


@dataclass(frozen=True)
class _Decoded:
    crop: tuple[float, ...]
    lost: tuple[str, str] | None = None  # reason and detail
    sample_id: str = ""


@dataclass
class _Batch:
    chunk: _Chunk
    rows: NDArray[np.int64]
    last: bool
    prepare: Callable[[_Batch], list[Callable[[], Any]]]
    known: bool = False
    futures: list[Future[Any]] = field(default_factory=list)
    asked_at: float = 0.0
    shown: torch.Tensor | None = None

    def submit(self, pool: ThreadPoolExecutor) -> None:
        self.asked_at = time.perf_counter()
        told = telemetry()
        self.futures = [pool.submit(told.prepared(self.chunk.ref.tower, job)) for job in self.prepare(self)]
        for future in self.futures:
            told.queued(future)

    def inputs(self) -> Any:
        """Of each row what was decoded; of captions the tokens, (rows, context_length) int64."""
        results = [future.result() for future in self.futures]
        return results[0] if results and self.chunk.ref.tower == "text" else results


class _Jobs:
    """Turns chunks into batches whose inputs can be prepared by any thread."""

    def __init__(
        self,
        teacher: LiveTeacher,
        writer: EmbeddingWriter,
        source: ImageSource,
        known: KnownRows | None,
        fetchers: ThreadPoolExecutor | None,
    ) -> None:
        self._known = known
        self._fetchers = fetchers
        self._tokenizer = teacher.tokenizer
        self._preprocess = teacher.preprocess
        self._shown = teacher.preprocess.shown()
        self._pinned = teacher.device.type == "cuda"
        # where this run found the images: the folder may have moved since the cache was planned
        self._source = source
        self._layout = writer.manifest.layout
        self._views = writer.manifest.identity.views
        self._samples, self._captions = writer.samples, writer.captions

    def batches(self, refs: Iterable[ChunkRef]) -> Iterator[_Batch]:
        batch_size = self._layout.batch_rows
        for ref in refs:
            rows = ref.rows(self._layout)
            arrays = {
                name: np.full(
                    (len(rows), *chunk_shape(self._layout, ref.tower, name)[1:]), np.nan, array_dtype(ref.tower, name)
                )
                for name in ARRAYS[ref.tower]
            }
            chunk = _Chunk(ref, rows, arrays)
            known = self._take_known(chunk)
            order = self._order(ref.tower, rows)
            numbers, known = rows.start + order, known[order]
            batches = [
                _Batch(chunk, part[start : start + batch_size], False, self._prepare(chunk, is_known), is_known)
                for part, is_known in ((numbers[known], True), (numbers[~known], False))
                for start in range(0, len(part), batch_size)
            ]
            batches[-1].last = True
            yield from batches

    def _order(self, tower: Tower, rows: range) -> NDArray[np.int64]:
        """Of the rows of a chunk: captions of like length share a batch, and are padded to the longest of it."""
        if tower == "image" or self._layout.text_order is None:
            return np.arange(len(rows))
        return order_by_length(self._captions.read(rows)["text"])

    def _prepare(self, chunk: _Chunk, known: bool) -> Callable[[_Batch], list[Callable[[], Any]]]:
        if known and (chunk.ref.tower == "text" or chunk.crops_known):
            return lambda _: []
        if chunk.ref.tower == "text":
            return self._text_jobs
        return self._measure_jobs if known else self._decode_jobs

    def _take_known(self, chunk: _Chunk) -> NDArray[np.bool_]:
        """Put the known rows of a chunk into it; which they are."""
        if self._known is None:
            return np.zeros(len(chunk.rows), np.bool_)
        known, arrays = self._known.take(chunk.ref, chunk.rows)
        if SCALE in arrays:
            chunk.arrays = arrays  # rounded already, and with another scale they would be so again
        else:
            for name, values in arrays.items():
                chunk.arrays[name][known] = values
        chunk.crops_known = "view" in arrays
        return known

    def _measure(self, sample: dict[str, Any]) -> _Decoded:
        """The crop of an image whose embedding is known, or why it has none; raises as :meth:`_decode`."""
        data = self._read(sample)
        try:
            size = decoded_size(data)
            self._preprocess.require_evaluable(*size)
            return _Decoded(self._preprocess.evaluation_crop(*size), sample_id=sample["sample_id"])
        except UndecodableImageError as error:
            lost = ("undecodable-image", str(error))
        except ValueError as error:
            lost = ("untransformable-image", f"{type(error).__name__}: {error}")
        return _Decoded((np.nan,) * 5, lost, sample["sample_id"])

    def _samples_of(self, rows: NDArray[np.int64]) -> list[dict[str, Any]]:
        """The samples of some rows, their images on the way where each is a request."""
        samples: list[dict[str, Any]] = _some(self._samples, rows).to_pylist()
        if self._fetchers is not None:
            for sample in samples:
                sample["content"] = self._fetchers.submit(self._fetch, sample)
        return samples

    def _read(self, sample: dict[str, Any]) -> bytes:
        return self._fetch(sample) if self._fetchers is None else sample["content"].result()

    def _fetch(self, sample: dict[str, Any]) -> bytes:
        data = self._source.read(sample["uri"], sample["offset"], sample["length"])
        require_content(data, sample["content_sha256"], self._source.resolve(sample["uri"]))
        return data

    def _measure_jobs(self, batch: _Batch) -> list[Callable[[], Any]]:
        return [partial(self._measure, sample) for sample in self._samples_of(batch.rows)]

    def _decode_jobs(self, batch: _Batch) -> list[Callable[[], Any]]:
        """Each writes its image to its place in the batch: one copy, by the threads that decode."""
        samples = self._samples_of(batch.rows)
        batch.shown = torch.empty(len(samples), *self._preprocess.size, 3, dtype=torch.uint8, pin_memory=self._pinned)
        places = batch.shown.numpy()
        view = batch.chunk.ref.view
        return [partial(self._decode, sample, view, place) for sample, place in zip(samples, places, strict=True)]

    def _decode(self, sample: dict[str, Any], view: int, place: NDArray[np.uint8]) -> _Decoded:
        """One view of an image as the teacher sees it into its place, and its crop; or why there is none.

        Raises:
            OSError: the bytes cannot be read just now; another try may, so the row is not given up.
            CacheMismatchError: they are not the bytes that the cache was planned with.
        """
        data = self._read(sample)
        try:
            image = open_image(data, self._preprocess.decoder)
            if view == 0:
                evaluation_crop = self._preprocess.evaluation_crop(*image.size)
                place[:] = self._shown(image)
                return _Decoded(evaluation_crop, sample_id=sample["sample_id"])
            self._preprocess.require_evaluable(*image.size)
            crop = draw_crop(self._views, sample["content_sha256"], view, *image.size)
            place[:] = crop_shown(image, crop, self._preprocess)
            return _Decoded(crop.as_row(), sample_id=sample["sample_id"])
        except MemoryError:
            raise  # the machine's fault, not the image's
        except UndecodableImageError as error:
            lost = ("undecodable-image", str(error))
        except Exception as error:  # one pixel by 600, a mode that a resize does not know: nothing ends the run
            lost = ("untransformable-image", f"{type(error).__name__}: {error}")
        # it keeps its place, black, so that its neighbours' batch is the same with and without it
        place[:] = 0
        return _Decoded((np.nan,) * 5, lost, sample["sample_id"])

    def _text_jobs(self, batch: _Batch) -> list[Callable[[], Any]]:
        """One, since threads cannot tokenize side by side."""
        return [partial(self._tokenizer, _some(self._captions, batch.rows)["text"].to_pylist())]


def _some(table: TableRows, rows: NDArray[np.int64]) -> pa.Table:
    first = int(rows.min())
    return table.read(range(first, int(rows.max()) + 1)).take(pa.array(rows - first))


def _one_ahead(pool: ThreadPoolExecutor, refs: Iterable[ChunkRef]) -> Iterator[ChunkRef]:
    """The same chunks, the next one already being asked for: in a store a claim is several requests."""
    left = iter(refs)
    coming = pool.submit(next, left, None)
    while (ref := coming.result()) is not None:
        coming = pool.submit(next, left, None)
        yield ref


def _ahead(pool: ThreadPoolExecutor, batches: Iterator[_Batch]) -> Iterator[_Batch]:
    """The same batches, a few of them already being prepared."""
    waiting: deque[_Batch] = deque()
    for batch in batches:
        batch.submit(pool)
        waiting.append(batch)
        if len(waiting) > _BATCHES_AHEAD:
            yield waiting.popleft()
    yield from waiting
