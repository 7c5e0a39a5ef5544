"""Work on a stretch of rows: a chunk of captions, or the chunks of all views of the same images.

An image is read and decoded once; one job makes the crops of all its views. A batch holds rows of one chunk and depends
on that chunk alone, so a resumed run writes the same bytes as an unbroken one.
"""

from __future__ import annotations

import logging
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from teacher_cache.pipeline.data.datasets.samples import ImageSource, require_content
from teacher_cache.pipeline.data.images.decode import UndecodableImageError, decoded_size
from teacher_cache.pipeline.data.images.decoders import open_image
from teacher_cache.pipeline.data.images.views import crop_shown, draw_crop
from teacher_cache.pipeline.data.tokens import order_by_length
from teacher_cache.pipeline.models.teacher import Encoded, LiveTeacher
from teacher_cache.pipeline.precompute.reuse import KnownRows
from teacher_cache.storage.format.arrays import array_dtype
from teacher_cache.storage.format.commits import ChunkRef, QuarantinedRow
from teacher_cache.storage.format.journal import ChunkCost
from teacher_cache.storage.format.layout import ARRAYS, SCALE, Layout, chunk_shape
from teacher_cache.storage.format.table_rows import TableRows
from teacher_cache.storage.observe.logs import event, logger
from teacher_cache.storage.observe.telemetry import submit_input
from teacher_cache.storage.write.writer import EmbeddingWriter

_LOG = logger("precompute")
_NO_CROP = (np.nan,) * 5


class Prepared(NamedTuple):
    """One view of an image, ready for the teacher.

    Attributes:
        crop: crop in the form of ``image/view``.
        lost: reason and detail of a view that cannot be encoded.
    """

    sample_id: str
    crop: tuple[float, ...]
    lost: tuple[str, str] | None = None


class ChunkWork:
    """Chunk that is being encoded: arrays of its rows, quarantined rows, and cost.

    Args:
        known: source of rows that need no teacher.
        sharing: number of chunks that are encoded together and share the seconds.
    """

    def __init__(self, ref: ChunkRef, layout: Layout, known: KnownRows | None, sharing: int = 1) -> None:
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
        self._quarantined.append(QuarantinedRow(row=row, sample_id=item.sample_id, reason=reason, detail=detail))
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
        submit: starts the jobs that prepare its inputs.
    """

    submit: Callable[[ThreadPoolExecutor, Batch], list[Future[Any]]]

    def __init__(self, chunk: ChunkWork, rows: NDArray[np.int64], known: bool, order: int) -> None:
        self.chunk, self.rows, self.known, self.order = chunk, rows, known, order
        self.pixels: torch.Tensor | None = None
        self.requested_at = 0.0
        self._futures: list[Future[Any]] = []

    @property
    def needs_images(self) -> bool:
        """True if its images must be opened, to decode them or to read the sizes of known rows."""
        return self.chunk.ref.tower == "image" and not (self.known and self.chunk.crops_known)

    def request(self, pool: ThreadPoolExecutor) -> Batch:
        """Start the preparation of the inputs in the threads, and return the batch."""
        self.requested_at = time.perf_counter()
        self._futures = self.submit(pool, self)
        return self

    def tokens(self) -> Any:
        """Wait for the token ids, (rows, context_length) int64."""
        return self._futures[0].result()

    def prepared(self) -> list[Prepared]:
        """Wait for the images and return them."""
        return [future.result()[self.chunk.ref.view] for future in self._futures]


class _Images:
    """Images of one stretch. One job per image writes the crops of all views to their places in the batches' buffers.

    Args:
        batches: all batches of the stretch. A buffer is allocated when its first image is requested.
    """

    def __init__(self, loader: _ImageLoader, batches: Sequence[Batch]) -> None:
        self._loader = loader
        self._places: defaultdict[int, list[tuple[Batch, int]]] = defaultdict(list)
        for batch in batches:
            if batch.needs_images:
                for index, row in enumerate(batch.rows.tolist()):
                    self._places[row].append((batch, index))
        self._jobs: dict[int, Future[dict[int, Prepared]]] = {}

    def submit(self, pool: ThreadPoolExecutor, batch: Batch) -> list[Future[Any]]:
        """Start the jobs that prepare a batch."""
        if not batch.needs_images:
            return []
        fresh = batch.rows[[row not in self._jobs for row in batch.rows.tolist()]]
        for row, sample in zip(fresh.tolist(), self._loader.samples(fresh) if len(fresh) else (), strict=True):
            self._jobs[row] = submit_input(pool, "image", self._loader.job(sample, self._places.pop(row)))
        return [self._jobs[row] for row in batch.rows.tolist()]


class _ImageLoader:
    """Loader of images, from bytes to the crops that the teacher sees. Thread-safe.

    Args:
        fetchers: threads that prefetch remote images.
    """

    def __init__(
        self, teacher: LiveTeacher, writer: EmbeddingWriter, source: ImageSource, fetchers: ThreadPoolExecutor | None
    ) -> None:
        self._preprocess = teacher.preprocess
        self._pinned = teacher.device.type == "cuda"
        self._views, self._table = writer.manifest.identity.views, writer.samples
        # the images' present location: the folder may have moved since the cache was planned
        self._source = source
        self._fetchers = fetchers

    def samples(self, rows: NDArray[np.int64]) -> list[dict[str, Any]]:
        """Return the samples of some rows, and start to prefetch remote images."""
        samples: list[dict[str, Any]] = _take(self._table, rows).to_pylist()
        if self._fetchers is not None:
            for sample in samples:
                sample["content"] = self._fetchers.submit(self._fetch, sample)
        return samples

    def job(self, sample: dict[str, Any], places: list[tuple[Batch, int]]) -> Callable[[], dict[int, Prepared]]:
        """Return the job that prepares an image for these places. Its result is keyed by view."""
        by_view: dict[int, NDArray[np.uint8] | None] = {
            batch.chunk.ref.view: None if batch.known else self._buffer(batch)[index] for batch, index in places
        }
        return lambda: self._prepare(sample, by_view)

    def _buffer(self, batch: Batch) -> NDArray[np.uint8]:
        if batch.pixels is None:
            shape = (len(batch.rows), *self._preprocess.size, 3)
            batch.pixels = torch.empty(*shape, dtype=torch.uint8, pin_memory=self._pinned)
        pixels: NDArray[np.uint8] = batch.pixels.numpy()
        return pixels

    def _prepare(self, sample: dict[str, Any], by_view: dict[int, NDArray[np.uint8] | None]) -> dict[int, Prepared]:
        """Decode an image once and write each view to its place; a lost view stays black.

        Args:
            by_view: place of each view. None: only its crop is needed.

        Raises:
            OSError: the bytes cannot be read now. A retry may succeed, so the row is not quarantined.
            CacheMismatchError: the image changed since the cache was planned.
        """
        data = self._fetch(sample) if self._fetchers is None else sample["content"].result()
        try:
            if all(place is None for place in by_view.values()):
                size, image = decoded_size(data), None
            else:
                image = open_image(data, self._preprocess.decoder)
                size = image.size
        except Exception as error:
            _raise_if_memory(error)
            return {view: self._lost(sample, place, error) for view, place in by_view.items()}
        return {view: self._view(sample, view, image, size, place) for view, place in by_view.items()}

    def _view(
        self, sample: dict[str, Any], view: int, image: Any, size: tuple[int, int], place: NDArray[np.uint8] | None
    ) -> Prepared:
        try:
            if view > 0 or place is None:
                self._preprocess.require_evaluable(*size)
            if view == 0:
                row = self._preprocess.evaluation_crop(*size)
                if place is not None:
                    place[:] = self._preprocess.shown(image)
            else:
                crop = draw_crop(self._views, sample["content_sha256"], view, *size)
                row = crop.as_row()
                if place is not None:
                    place[:] = crop_shown(image, crop, self._preprocess)
        except Exception as error:  # an odd image, such as 1 x 600 pixels, must not end the run
            _raise_if_memory(error)
            return self._lost(sample, place, error)
        return Prepared(sample["sample_id"], row)

    def _lost(self, sample: dict[str, Any], place: NDArray[np.uint8] | None, error: Exception) -> Prepared:
        # a black image keeps the place, so the batch is the same for its neighbours
        if place is not None:
            place[:] = 0
        if isinstance(error, UndecodableImageError):
            return Prepared(sample["sample_id"], _NO_CROP, ("undecodable-image", str(error)))
        return Prepared(sample["sample_id"], _NO_CROP, ("untransformable-image", f"{type(error).__name__}: {error}"))

    def _fetch(self, sample: dict[str, Any]) -> bytes:
        data = self._source.read(sample["uri"], sample["offset"], sample["length"])
        require_content(data, sample["content_sha256"], self._source.resolve(sample["uri"]))
        return data


class StretchReader:
    """Reader of stretches of rows in batches.

    Args:
        known: rows that need no teacher.
        fetchers: threads that prefetch remote images.
    """

    def __init__(
        self,
        teacher: LiveTeacher,
        writer: EmbeddingWriter,
        source: ImageSource,
        known: KnownRows | None,
        fetchers: ThreadPoolExecutor | None,
    ) -> None:
        self._known, self._layout, self._captions = known, writer.manifest.layout, writer.captions
        self._tokenizer = teacher.tokenizer
        self._loader = _ImageLoader(teacher, writer, source, fetchers)

    def batches(self, stretch: Sequence[ChunkRef]) -> Iterator[Batch]:
        """Yield the batches of chunks of the same rows: known rows first, then in reading order."""
        order = self._order(stretch[0])
        chunks = [ChunkWork(ref, self._layout, self._known, len(stretch)) for ref in stretch]
        # hold no batch here: its buffer must be freed after its turn
        waiting = deque(sorted(self._cut(chunks, order), key=lambda batch: (not batch.known, batch.order)))
        is_text = stretch[0].tower == "text"
        submit = self._submit_captions if is_text else _Images(self._loader, list(waiting)).submit
        while waiting:
            batch = waiting.popleft()
            batch.submit = submit
            yield batch

    def _submit_captions(self, pool: ThreadPoolExecutor, batch: Batch) -> list[Future[Any]]:
        """Start the job that makes a batch's token ids: one, because threads cannot tokenize in parallel."""
        if batch.known:
            return []
        texts = _take(self._captions, batch.rows)["text"].to_pylist()
        return [submit_input(pool, "text", lambda: self._tokenizer(texts))]

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


def _raise_if_memory(error: Exception) -> None:
    """Raise an error for want of memory again: the machine's fault, not the image's. torch's is a RuntimeError."""
    if isinstance(error, MemoryError) or "DefaultCPUAllocator" in str(error):
        raise error


def _take(table: TableRows, rows: NDArray[np.int64]) -> pa.Table:
    first = int(rows.min())
    return table.read(range(first, int(rows.max()) + 1)).take(pa.array(rows - first))
