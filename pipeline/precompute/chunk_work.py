"""Work on a stretch of rows: a chunk of captions, or the chunks of all views of the same images.

An image is read and decoded once; one job makes the crops of all its views. A batch holds rows of one chunk and depends
on that chunk alone, so a resumed run writes the same bytes as an unbroken one.
"""

from __future__ import annotations

import logging
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from teacher_cache.pipeline.data.service.service import DecodeService
from teacher_cache.pipeline.data.service.slots import Slot, Slots
from teacher_cache.pipeline.data.tokens import order_by_length
from teacher_cache.pipeline.models.teacher import Encoded, LiveTeacher
from teacher_cache.pipeline.precompute.reuse import KnownRows
from teacher_cache.pipeline.precompute.teacher_inputs import ImageItem, Made, Place, Prepared, TeacherInputs, TextItem
from teacher_cache.storage.format.arrays import array_dtype
from teacher_cache.storage.format.commits import ChunkRef, QuarantinedRow
from teacher_cache.storage.format.journal import ChunkCost
from teacher_cache.storage.format.layout import ARRAYS, SCALE, Layout, Tower, chunk_shape
from teacher_cache.storage.format.table_rows import TableRows
from teacher_cache.storage.observe.logs import event, logger
from teacher_cache.storage.observe.telemetry import count_input
from teacher_cache.storage.write.writer import EmbeddingWriter

_LOG = logger("precompute")


class ChunkWork:
    """Chunk that is being encoded: arrays of its rows, quarantined rows, and cost.

    Args:
        known: source of rows that need no teacher.
        samples: the cache's images, to name a quarantined one.
        sharing: number of chunks that are encoded together and share the seconds.
    """

    def __init__(
        self, ref: ChunkRef, layout: Layout, known: KnownRows | None, samples: TableRows, sharing: int = 1
    ) -> None:
        self._samples = samples
        self.ref, self.rows = ref, ref.rows(layout)
        self.arrays: dict[str, NDArray[Any]] = {
            name: np.full(
                (len(self.rows), *chunk_shape(layout, ref.tower, name)[1:]), np.nan, array_dtype(ref.tower, name)
            )
            for name in ARRAYS[ref.tower]
        }
        self.crops_known = False
        self.known = self._fill_known(known)
        self._quarantined: list[QuarantinedRow] = []
        self.sharing = sharing
        self._pending, self._encoded_rows = len(self.rows), 0
        self._started: float | None = None
        self._decode_wait_seconds = self._teacher_seconds = 0.0

    def _fill_known(self, known: KnownRows | None) -> NDArray[np.bool_]:
        """Copy the known rows into the arrays and return their mask."""
        if known is None:
            return np.zeros(len(self.rows), np.bool_)
        is_known, arrays = known.take(self.ref, self.rows)
        if SCALE in arrays:
            self.arrays = arrays  # rounded already: another scale would round them a second time
        else:
            for name, values in arrays.items():
                self.arrays[name][is_known] = values
        self.crops_known = "view" in arrays
        return is_known

    @property
    def complete(self) -> bool:
        """True once every row is stored."""
        return self._pending == 0

    @property
    def nbytes(self) -> int:
        """Bytes of its arrays."""
        return sum(values.nbytes for values in self.arrays.values())

    def start(self, at: float) -> None:
        """Record when the chunk's first input was requested."""
        if self._started is None:
            self._started = at

    def spend(self, decode_wait_seconds: float, teacher_seconds: float) -> None:
        """Add to the chunk's cost."""
        self._decode_wait_seconds += decode_wait_seconds
        self._teacher_seconds += teacher_seconds

    def put(self, batch: Batch, prepared: Sequence[Prepared], encoded: Encoded | None, teacher: LiveTeacher) -> None:
        """Store the embeddings of one batch, and quarantine its rows without one.

        Args:
            prepared: one per image; empty for captions and for known crops.
            encoded: None for known rows, which are stored already.

        Raises:
            FloatingPointError: the teacher's features of a caption are not finite.
        """
        self._pending -= len(batch.rows)
        at = batch.rows - self.rows.start
        if encoded is not None:
            self._encoded_rows += len(batch.rows)
            self.arrays["embedding"][at], self.arrays["norm"][at] = encoded.embedding, encoded.norm
        if prepared:
            self.arrays["view"][at] = np.array([item.crop for item in prepared], np.float32)
        if encoded is None and not prepared:
            return
        finite = np.isfinite(self.arrays["embedding"][at]).all(axis=1) & np.isfinite(self.arrays["norm"][at])
        if self.ref.tower == "text":
            if not finite.all():
                raise self._overflow(teacher, int(batch.rows[~finite][0]))
            return
        for row, item, is_finite in zip(batch.rows.tolist(), prepared, finite, strict=True):
            if item.lost or not is_finite:
                self._quarantine(row, item)

    def _quarantine(self, row: int, item: Prepared) -> None:
        reason, detail = item.lost or ("not-finite", "the teacher's features are NaN, infinite or zero")
        sample_id = self._samples.read(range(row, row + 1))["sample_id"][0].as_py()
        self._quarantined.append(QuarantinedRow(row=row, sample_id=sample_id, reason=reason, detail=detail))
        for values in self.arrays.values():
            values[row - self.rows.start] = np.nan

    def _overflow(self, teacher: LiveTeacher, row: int) -> FloatingPointError:
        return FloatingPointError(
            f"{self.ref.tower} row {row}: the teacher's features are not finite in {teacher.precision}. "
            "Use --precision bf16 or fp32 and a new cache."
        )

    def write(self, writer: EmbeddingWriter, teacher: LiveTeacher) -> None:
        """Write and commit the chunk.

        Raises:
            FloatingPointError: most images have features that are not finite, so the arithmetic is at fault.
        """
        assert self._started is not None  # its last batch started it
        odd = [row.row for row in self._quarantined if row.reason == "not-finite"]
        if len(odd) > 1 and 2 * len(odd) > len(self.rows) - len(self._quarantined) + len(odd):
            raise self._overflow(teacher, odd[0])
        cost = ChunkCost(
            rows=len(self.rows),
            encoded_rows=self._encoded_rows if self._encoded_rows < len(self.rows) else None,
            seconds=(time.perf_counter() - self._started) / self.sharing,
            decode_wait_seconds=self._decode_wait_seconds,
            teacher_seconds=self._teacher_seconds,
            device=str(teacher.device),
        )
        began = time.perf_counter()
        writer.write(self.ref, self.arrays, self._quarantined, cost)
        self._report(cost, time.perf_counter() - began)

    def _report(self, cost: ChunkCost, write_seconds: float) -> None:
        where = {"chunk": self.ref.name, "rows": [self.rows.start, self.rows.stop]}
        for lost in self._quarantined:
            event(_LOG, logging.WARNING, "row quarantined", chunk=self.ref.name, **lost.model_dump())
        seconds = cost.model_dump(include={"seconds", "decode_wait_seconds", "teacher_seconds"})
        counted = {"quarantined": len(self._quarantined), "write_seconds": write_seconds}
        event(_LOG, logging.INFO, "chunk committed", **where, **seconds, **counted)


class Batch:
    """Rows of one chunk that share a forward pass, or are known.

    Args:
        order: position of its last row in the stretch. Batches are encoded in this order.

    Attributes:
        slot: slot of its pixels or tokens, taken when the first of them is requested.
    """

    submit: Callable[[Batch], list[tuple[Future[list[Made]], int]]]

    def __init__(self, chunk: ChunkWork, rows: NDArray[np.int64], known: bool, order: int) -> None:
        self.chunk, self.rows, self.known, self.order = chunk, rows, known, order
        self.slot: Slot | None = None
        self.requested_at = 0.0
        self._jobs: list[tuple[Future[list[Made]], int]] = []

    @property
    def needs_images(self) -> bool:
        """True if its images must be opened, to decode them or to read the sizes of known rows."""
        return self.chunk.ref.tower == "image" and not (self.known and self.chunk.crops_known)

    def request(self) -> Batch:
        """Start the preparation of the inputs, and return the batch."""
        self.requested_at = time.perf_counter()
        self._jobs = self.submit(self)
        return self

    def prepared(self) -> list[Prepared]:
        """Wait for the inputs, and return the views of its images; nothing for captions."""
        made = [future.result()[place] for future, place in self._jobs]
        return [image.views[self.chunk.ref.view] for image in made] if self.needs_images else []


class _Images:
    """Images of one stretch. One job per image writes the crops of all views to their places in the batches' slots.

    Args:
        batches: all batches of the stretch. A slot is taken when its first image is requested.
    """

    def __init__(self, reader: StretchReader, batches: Sequence[Batch]) -> None:
        self._reader = reader
        self._places: defaultdict[int, list[tuple[Batch, int]]] = defaultdict(list)
        for batch in batches:
            if batch.needs_images:
                for index, row in enumerate(batch.rows.tolist()):
                    self._places[row].append((batch, index))
        self._jobs: dict[int, tuple[Future[list[Made]], int]] = {}

    def submit(self, batch: Batch) -> list[tuple[Future[list[Made]], int]]:
        """Start the jobs that prepare a batch."""
        if not batch.needs_images:
            return []
        fresh = batch.rows[[row not in self._jobs for row in batch.rows.tolist()]]
        samples = _take(self._reader.samples, fresh).to_pylist() if len(fresh) else []
        items = [ImageItem(sample, self._taken(row)) for row, sample in zip(fresh.tolist(), samples, strict=True)]
        self._jobs.update(zip(fresh.tolist(), self._reader.submit("image", items), strict=True))
        return [self._jobs[row] for row in batch.rows.tolist()]

    def _taken(self, row: int) -> tuple[Place, ...]:
        places = self._places.pop(row)
        return tuple(
            Place(batch.chunk.ref.view, None if batch.known else self._reader.slot(batch), index)
            for batch, index in places
        )


class StretchReader:
    """Reader of stretches of rows in batches.

    Args:
        known: rows that need no teacher.
        inputs: what ``service`` prepares in ``slots``.

    Attributes:
        samples: the cache's images.
    """

    def __init__(
        self,
        writer: EmbeddingWriter,
        known: KnownRows | None,
        inputs: TeacherInputs,
        slots: Slots,
        service: DecodeService,
    ) -> None:
        self._known, self._layout, self._captions = known, writer.manifest.layout, writer.captions
        self.samples = writer.samples
        self._inputs, self._slots, self._service = inputs, slots, service

    def slot(self, batch: Batch) -> Slot:
        """Return a batch's slot."""
        if batch.slot is None:
            batch.slot = self._slots.take(self._layout.batch_rows * self._inputs.row_bytes)
        return batch.slot

    def done(self, batch: Batch) -> None:
        """Give back a batch's slot, which is not read any longer."""
        if batch.slot is not None:
            self._slots.give_back(batch.slot)

    def submit(self, tower: Tower, items: Sequence[Any]) -> Iterator[tuple[Future[list[Made]], int]]:
        """Hand items to the service, and yield the future of each and its place among the future's results."""
        # threads cannot tokenize in parallel, so a batch of captions is one job for them
        ticket = self._service.ticket if tower == "image" or self._service.ticket > 1 else len(items)
        for start in range(0, len(items), ticket):
            part = items[start : start + ticket]
            if tower == "image" and self._service.ticket == 1:
                part = [self._inputs.request(item) for item in part]
            future = self._service.submit(part)
            count_input(future, tower, lambda made: [image.seconds for image in made if image.seconds])
            yield from ((future, place) for place in range(len(part)))

    def pixels(self, batch: Batch) -> torch.Tensor:
        """Return a prepared batch's images, (rows, height, width, 3) uint8. They are its slot."""
        assert batch.slot is not None  # taken when they were requested
        return torch.from_numpy(self._inputs.shown(self._slots, batch.slot, len(batch.rows)))

    def tokens(self, batch: Batch) -> torch.Tensor:
        """Return a prepared batch's tokens, (rows, context_length) int64. They are its slot."""
        assert batch.slot is not None
        return torch.from_numpy(self._inputs.tokens(self._slots, batch.slot, len(batch.rows)))

    def batches(self, stretch: Sequence[ChunkRef]) -> Iterator[Batch]:
        """Yield the batches of chunks of the same rows: known rows first, then in reading order."""
        order = self._order(stretch[0])
        chunks = [ChunkWork(ref, self._layout, self._known, self.samples, len(stretch)) for ref in stretch]
        waiting = deque(sorted(self._cut(chunks, order), key=lambda batch: (not batch.known, batch.order)))
        is_text = stretch[0].tower == "text"
        submit = self._submit_captions if is_text else _Images(self, list(waiting)).submit
        while waiting:
            batch = waiting.popleft()
            batch.submit = submit
            yield batch

    def _submit_captions(self, batch: Batch) -> list[tuple[Future[list[Made]], int]]:
        """Start the jobs that make a batch's token ids."""
        if batch.known:
            return []
        texts, slot = _take(self._captions, batch.rows)["text"].to_pylist(), self.slot(batch)
        return list(self.submit("text", [TextItem(text, slot, index) for index, text in enumerate(texts)]))

    def _cut(self, chunks: Iterable[ChunkWork], order: NDArray[np.int64]) -> Iterator[Batch]:
        size = self._layout.batch_rows
        for chunk in chunks:
            for known in (True, False):
                ranks = np.flatnonzero(chunk.known[order] == known)
                for start in range(0, len(ranks), size):
                    part = ranks[start : start + size]
                    yield Batch(chunk, chunk.rows.start + order[part], known, int(part[-1]))

    def _order(self, ref: ChunkRef) -> NDArray[np.int64]:
        """Return the order of a chunk's rows. Captions of similar length share a batch, which saves padding."""
        rows = ref.rows(self._layout)
        if ref.tower == "image" or self._layout.text_order is None:
            return np.arange(len(rows))
        return order_by_length(self._captions.read(rows)["text"])


def _take(table: TableRows, rows: NDArray[np.int64]) -> pa.Table:
    first = int(rows.min())
    return table.read(range(first, int(rows.max()) + 1)).take(pa.array(rows - first))
