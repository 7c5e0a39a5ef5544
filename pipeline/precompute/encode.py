"""Encoding of chunks of a planned cache: decode, run the teacher, write and commit; alone or with other processes.

Decoding (threads or processes), the teacher (the calling thread) and writing (one thread, two to a store) overlap, also
across chunks. A GPU gets its next batch before the last one's embeddings are copied back. Several processes share a
cache by claims (``teacher_cache.storage.write.claims``), one per stretch of rows: the chunks of all views of the same
images.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections import Counter, deque
from collections.abc import Collection, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import chain, islice, repeat, takewhile
from types import TracebackType
from typing import Any, NamedTuple, Self

import torch

from teacher_cache.pipeline.data.cores import decode_processes, decode_threads
from teacher_cache.pipeline.data.datasets.files import data_folder
from teacher_cache.pipeline.data.datasets.samples import ImageSource
from teacher_cache.pipeline.data.datasets.spec import DatasetSpec
from teacher_cache.pipeline.data.service.pinned import pinned_for
from teacher_cache.pipeline.data.service.service import DecodeProcesses, DecodeService, DecodeThreads
from teacher_cache.pipeline.data.service.slots import Slots
from teacher_cache.pipeline.models.device import keep_freed_memory, memory_told
from teacher_cache.pipeline.models.teacher import Encoded, LiveTeacher
from teacher_cache.pipeline.precompute.chunk_work import Batch, StretchReader
from teacher_cache.pipeline.precompute.plan import Progress, rows_by_tower
from teacher_cache.pipeline.precompute.reuse import KnownRows, known_rows
from teacher_cache.pipeline.precompute.teacher_inputs import Prepared, TeacherInputs
from teacher_cache.pipeline.settings.precompute import PrecomputeConfig
from teacher_cache.storage.files.location import begun_ahead, requests_at_once, results_ahead
from teacher_cache.storage.files.protocol import REQUESTS_AT_ONCE
from teacher_cache.storage.format.commits import ChunkRef, stretches_of
from teacher_cache.storage.format.layout import Layout, Tower
from teacher_cache.storage.observe.logs import event, hint, logger
from teacher_cache.storage.write.claims import Claims
from teacher_cache.storage.write.writer import EmbeddingWriter

_LOG = logger("precompute")

_BATCHES_AHEAD = 4
_WRITES_AHEAD = 2  # stretches of rows that may wait for the disk before the teacher waits
_BYTES_AHEAD = {"cuda": 128 * 2**20}  # by device type: more of them within these bytes, which a GPU fills in seconds
_BATCHES_BEHIND = {"cuda": 2}  # by device type: batches in flight while the next one is launched
_LEAST_GPU_ROWS = 256
_OTHERS_POLL_SECONDS = 0.5


def encode_chunks(
    config: PrecomputeConfig, teacher: LiveTeacher, refs: Sequence[ChunkRef], progress: Progress | None = None
) -> None:
    """Encode chunks of a planned cache that no other process writes to. Replaces them if they are committed.

    The row of an undecodable image is quarantined, and the chunk's commit names the image.
    """
    writer = EmbeddingWriter(config.cache)
    teacher.require(writer.manifest.identity, config.cache)
    writer.replaces.update(refs)
    _Encoder(config, teacher, writer, RowTally(writer.manifest.layout, refs, progress)).encode(stretches_of(refs))


def encode_shared(
    config: PrecomputeConfig,
    teacher: LiveTeacher,
    refs: Sequence[ChunkRef],
    progress: Progress | None = None,
    known: KnownRows | None = None,
    writer: EmbeddingWriter | None = None,
) -> int:
    """Encode as :func:`encode_claimed` does, and return how many chunks this process encoded."""
    return len(encode_claimed(config, teacher, refs, progress, known, writer))


def encode_claimed(
    config: PrecomputeConfig,
    teacher: LiveTeacher,
    refs: Sequence[ChunkRef],
    progress: Progress | None = None,
    known: KnownRows | None = None,
    writer: EmbeddingWriter | None = None,
) -> set[ChunkRef]:
    """Encode chunks together with all other processes that encode this cache.

    When it returns, every chunk is committed, by any of the processes. Chunks of a dead process are taken over last,
    one stretch at a time. If a chunk kills process after process, its claims show which one.

    Args:
        known: rows that are copied instead of encoded. Default: those of ``config.reuse``.
        writer: writer of this cache, which reuses tables that it has read.

    Returns:
        The chunks that this process encoded.
    """
    writer = writer or EmbeddingWriter(config.cache)
    teacher.require(writer.manifest.identity, config.cache)
    known = known or known_rows(config.reuse, writer)
    tally = RowTally(writer.manifest.layout, refs, progress)
    shared = _SharedChunks(writer, refs)
    encoder = _Encoder(config, teacher, writer, tally, known)
    with tally, Claims(writer.files) as claims:
        while shared.pending:
            stretches, claimed = stretches_of(shared.pending), list[ChunkRef]()
            # the stretches that killed the most processes come last, one at a time
            for takeovers in (0, 1, None):
                coming = claims.share(stretches, lambda ref: shared.is_done(ref) and tally.found(ref), takeovers)
                encoder.encode(_noted(coming if takeovers == 0 else islice(coming, 1), claimed))
                if claimed:
                    break
            tally.add(shared.settle(claimed))
            if shared.pending and not claimed:
                time.sleep(_OTHERS_POLL_SECONDS)
    return shared.encoded


class RowTally:
    """Counter of finished rows of some chunks, whichever process encoded them. It reports to progress and telemetry.

    As a context manager it undoes its counts when an error ends the block: the retry counts them again.
    """

    def __init__(self, layout: Layout, refs: Iterable[ChunkRef], progress: Progress | None) -> None:
        self._layout = layout
        self._progress = progress
        self._done: Counter[Tower] = Counter()
        self._found, self._whole = deque[ChunkRef](), set[ChunkRef]()
        self._total = rows_by_tower(layout, refs)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for tower, rows in self._done.items() if error is not None else ():
            event(_LOG, logging.DEBUG, "rows done", tower=tower, num_rows=-rows)

    def found(self, ref: ChunkRef) -> bool:
        """Note a finished chunk, which is counted with the next rows. May be called in any thread. Return True."""
        self._found.append(ref)
        return True

    def add_rows(self, ref: ChunkRef, rows: int) -> None:
        """Count rows of a chunk, and the chunks that were found finished."""
        finished = [self._found.popleft() for _ in range(len(self._found))]
        self._count(finished, Counter({ref.tower: rows}))

    def add(self, refs: Iterable[ChunkRef]) -> None:
        """Count all rows of chunks, of each chunk once."""
        self._count(refs, Counter())

    def _count(self, whole: Iterable[ChunkRef], rows: Counter[Tower]) -> None:
        for ref in whole:
            if ref not in self._whole:
                self._whole.add(ref)
                rows[ref.tower] += len(ref.rows(self._layout))
        for tower, more in rows.items():
            self._done[tower] += more
            event(_LOG, logging.DEBUG, "rows done", tower=tower, num_rows=more)
            if self._progress is not None:
                self._progress("images" if tower == "image" else "captions", self._done[tower], self._total[tower])


class _SharedChunks:
    """Chunks that several processes share: the pending ones, and those that this process encoded."""

    def __init__(self, writer: EmbeddingWriter, refs: Sequence[ChunkRef]) -> None:
        self._writer = writer
        self.pending = list(refs)
        self.encoded: set[ChunkRef] = set()
        # damaged chunks have a commit record too, so the record does not mean done; an earlier try's are sound
        self._sound = writer.sound(refs)

    def is_done(self, ref: ChunkRef) -> bool:
        """Return whether a chunk needs no more work."""
        if ref in self.encoded or ref in self._sound:
            return True
        return self._writer.is_sound(ref) if ref in self._writer.replaces else self._writer.is_committed(ref)

    def settle(self, claimed: Collection[ChunkRef]) -> list[ChunkRef]:
        """Remove the finished chunks, and return those that other processes encoded."""
        own = self._writer.written.intersection(claimed)
        if late := len(claimed) - len(own):
            hint(
                f"warning: {late} of {len(claimed)} chunks that this process encoded were committed by another process "
                "first: this one stood still for too long, and was given up. Nothing is lost or changed"
            )
        self.encoded |= own
        elsewhere = [ref for ref in self.pending if ref not in claimed and self.is_done(ref)]
        finished = {*claimed, *elsewhere}
        self.pending = [ref for ref in self.pending if ref not in finished]
        return elsewhere


class _Launched(NamedTuple):
    """Batch that was launched; a GPU may still be working on it."""

    batch: Batch
    prepared: list[Prepared]
    encoded: Encoded | None
    decode_wait_seconds: float
    seconds: float


class _Encoder:
    """Encoder of one run."""

    def __init__(
        self,
        config: PrecomputeConfig,
        teacher: LiveTeacher,
        writer: EmbeddingWriter,
        tally: RowTally,
        known: KnownRows | None = None,
    ) -> None:
        keep_freed_memory(teacher.device)
        rows = writer.manifest.layout.batch_rows
        if teacher.device.type == "cuda" and rows < _LEAST_GPU_ROWS:
            hint(
                f"warning: {rows} rows are encoded at once, as the cache was planned: a GPU spends most of its time on "
                "launches. A new cache with --batch-size 1024 is many times as fast"
            )
        self._teacher, self._writer, self._tally, self._known = teacher, writer, tally, known
        self._threads = config.decode_threads or decode_threads()
        cuda = teacher.device.type == "cuda"
        self._processes = decode_processes(cuda) if config.decode_processes is None else config.decode_processes
        self._inputs = TeacherInputs(
            teacher.preprocess.without_torch(),
            teacher.preprocess.decoder,
            writer.manifest.identity.views,
            # the images' present location: the folder may have moved since the cache was planned
            ImageSource(data_folder(DatasetSpec.parse(config.dataset).root)),
            teacher.tokenizer,
            int(teacher.tokenizer.context_length),
            max(1, REQUESTS_AT_ONCE // max(1, self._processes)),
        )
        self._remote = requests_at_once(writer.files) > 1

    def encode(self, stretches: Iterable[list[ChunkRef]]) -> None:
        """Encode stretches of rows, each requested when its turn comes. When it returns, all are committed."""
        behind = _BATCHES_BEHIND.get(self._teacher.device.type, 0)
        launched: deque[_Launched] = deque()
        rows = self._writer.manifest.layout.batch_rows
        advice = (
            f"{rows} rows are encoded at once, which is part of the cache's layout. Free the GPU, or start a new cache "
            f"with --batch-size {max(1, rows // 4)}"
        )
        coming = iter(stretches)
        with memory_told(advice), ThreadPoolExecutor(1) as claimer:
            # a claim syncs a file, or takes requests to a store: the next stretch is claimed ahead, in another thread
            claimed = takewhile(bool, results_ahead(claimer, lambda _: next(coming, []), repeat(None), 1))
            if (first := next(claimed, None)) is None:
                return  # others encode what is left: nothing is started for it
            with self._pools() as (reader, writers):
                batches = (batch for stretch in chain([first], claimed) for batch in reader.batches(stretch))
                for batch in begun_ahead(Batch.request, batches, _BATCHES_AHEAD):
                    launched.append(self._launch(batch, reader))
                    while len(launched) > behind:
                        self._finish(launched.popleft(), reader, writers)
                while launched:
                    self._finish(launched.popleft(), reader, writers)
                writers.drain()

    @contextlib.contextmanager
    def _pools(self) -> Iterator[tuple[StretchReader, _Writers]]:
        slots = Slots(pinned_for(self._teacher.device))
        with (
            # a store takes two chunks at a time, while the next one is claimed
            ThreadPoolExecutor(_WRITES_AHEAD if self._remote else 1) as writers,
            contextlib.closing(slots),
            contextlib.closing(self._inputs),
            self._service(slots) as service,
        ):
            reader = StretchReader(self._writer, self._known, self._inputs, slots, service)
            try:
                yield reader, _Writers(writers, _BYTES_AHEAD.get(self._teacher.device.type, 0))
            except BaseException:
                service.close()  # no more decoding; complete chunks are still written
                event(_LOG, logging.DEBUG, "chunks in flight", chunks=0)
                raise

    def _service(self, slots: Slots) -> DecodeService:
        if self._processes:
            return DecodeProcesses(self._inputs, slots, self._processes)
        return DecodeThreads(self._inputs, slots, self._threads)

    def _launch(self, batch: Batch, reader: StretchReader) -> _Launched:
        """Wait for a batch's inputs and launch the teacher, unless the rows are known."""
        chunk, encoded = batch.chunk, None
        chunk.start(batch.requested_at)
        waited = time.perf_counter()
        prepared = batch.prepared()
        began = time.perf_counter()
        if not batch.known and chunk.ref.tower == "text":
            encoded = self._teacher.encode_texts(reader.tokens(batch))
        elif not batch.known:
            encoded = self._teacher.encode_shown(reader.pixels(batch))
        return _Launched(batch, prepared, encoded, began - waited, time.perf_counter() - began)

    def _finish(self, launched: _Launched, reader: StretchReader, writers: _Writers) -> None:
        """Store a batch's embeddings, and submit its chunk for writing after the last batch."""
        batch, encoded = launched.batch, launched.encoded
        chunk, began = batch.chunk, time.perf_counter()
        try:
            chunk.put(batch, launched.prepared, encoded, self._teacher)
        except torch.AcceleratorError as error:  # told when the GPU is waited for, by then with later work
            error.add_note(f"while the GPU encoded chunk {chunk.ref.name} or the one after it")
            raise
        reader.done(batch)
        # for a GPU its own working time, not the wall clock of Python
        on_device = encoded.device_seconds() if encoded is not None else None
        seconds = launched.seconds + time.perf_counter() - began if on_device is None else on_device
        chunk.spend(launched.decode_wait_seconds, seconds)
        of_teacher = None if batch.known else seconds
        waited = launched.decode_wait_seconds
        counted = {"num_rows": len(batch.rows), "decode_wait_seconds": waited, "teacher_seconds": of_teacher}
        event(_LOG, logging.DEBUG, "batch encoded", tower=chunk.ref.tower, **counted)
        self._tally.add_rows(chunk.ref, len(batch.rows))
        if chunk.complete:
            writers.submit(chunk.sharing, chunk.nbytes, lambda: chunk.write(self._writer, self._teacher))


class _Writers:
    """Queue of chunks to write. :meth:`submit` waits while two stretches of rows, and ``most`` bytes, are written."""

    def __init__(self, pool: ThreadPoolExecutor, most: int) -> None:
        self._pool, self._most = pool, most
        self._writing: deque[tuple[Future[None], int]] = deque()

    def submit(self, sharing: int, nbytes: int, write: Any) -> None:
        """Start writing a chunk of this size, one of ``sharing`` in its stretch."""
        while len(self._writing) >= _WRITES_AHEAD * sharing and self._bytes + nbytes > self._most:
            self._wait()
        self._writing.append((self._pool.submit(write), nbytes))
        event(_LOG, logging.DEBUG, "chunks in flight", chunks=len(self._writing))

    @property
    def _bytes(self) -> int:
        return sum(nbytes for _, nbytes in self._writing)

    def drain(self) -> None:
        """Wait until all chunks are written."""
        while self._writing:
            self._wait()
            event(_LOG, logging.DEBUG, "chunks in flight", chunks=len(self._writing))

    def _wait(self) -> None:
        self._writing.popleft()[0].result()


def _noted(stretches: Iterable[list[ChunkRef]], claimed: list[ChunkRef]) -> Iterator[list[ChunkRef]]:
    for stretch in stretches:
        claimed.extend(stretch)
        yield stretch
