"""All rows of one array in memory, shared by all processes of a machine: for fully random orders."""

from __future__ import annotations

import contextlib
import mmap
import os
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import reduction
from typing import Any

import numpy as np
from numpy.typing import NDArray

from teacher_cache.storage.files.local import unnamed_file
from teacher_cache.storage.files.location import results_ahead
from teacher_cache.storage.format.arrays import stored_form
from teacher_cache.storage.format.commits import ChunkRef
from teacher_cache.storage.format.int8 import unit_dequantized
from teacher_cache.storage.format.layout import Tower
from teacher_cache.storage.read.chunks import ChunkSource
from teacher_cache.storage.read.rows import RowPlaces
from teacher_cache.storage.read.stream import loads_at_once

_LEAST_AHEAD = 4  # chunks prefetched, at least
_REMOTE_AHEAD = 16  # of a store
_WRITTEN_AT_ONCE = 1 << 28  # bytes


class ResidentRows:
    """Rows of one array in shared memory, proven when they were loaded.

    Made by :meth:`teacher_cache.storage.read.reader.EmbeddingReader.resident`. The rows are private memory, in huge
    pages if the system has them; forked workers share it with their parent, because no process writes to it. When this
    object is sent to a spawned worker, as an argument or through a queue, the rows move to a memory file; during the
    move they exist twice. The file has no name: it is freed with the last process that uses it, also after a kill.
    Threads and processes may read at once.

    Args:
        rows: The rows; made read-only.
        places: Rows of one view, their chunks and views.
        quarantined: Positions in ``rows`` without an embedding.
        scales: For int8, the step of each column by chunk, view after view: (chunks, dim).
        name: Cache and array, for messages.
        descriptor: File descriptor of the memory; closed with this object. Default: none.

    Attributes:
        rows: (views x rows, ...) read-only, of the stored dtype, view after view. Quarantined rows are NaN, of int8
            -128; :meth:`take` refuses them.
    """

    def __init__(
        self,
        rows: NDArray[Any],
        places: RowPlaces,
        quarantined: NDArray[np.int64],
        scales: NDArray[np.float32] | None,
        name: str,
        descriptor: int = -1,
    ) -> None:
        rows.flags.writeable = False
        self.rows, self._places, self._quarantined, self._scales, self._name = rows, places, quarantined, scales, name
        self._descriptor = descriptor

    def __del__(self) -> None:
        descriptor, self._descriptor = getattr(self, "_descriptor", -1), -1
        if descriptor >= 0:
            os.close(descriptor)

    def __reduce__(self) -> tuple[Any, ...]:
        if self._descriptor < 0:
            self._move()
        fields = (self._places, self._quarantined, self._scales, self._name)
        return _attach, (reduction.DupFd(self._descriptor), self.rows.shape, self.rows.dtype.str, *fields)

    def _move(self) -> None:
        """Move the rows to a memory file."""
        descriptor = unnamed_file("teacher-cache rows")
        try:
            _write(descriptor, self.rows)
            rows = _mapped(descriptor, self.rows.shape, self.rows.dtype.str)
        except BaseException:
            os.close(descriptor)
            raise
        self.rows, self._descriptor = rows, descriptor

    @property
    def nbytes(self) -> int:
        """Bytes that the rows take, in all processes together."""
        return self.rows.nbytes

    def take(self, rows: NDArray[np.int64], view: int | NDArray[np.int64] = 0) -> NDArray[Any]:
        """Return rows in the order given, as a new array, as :meth:`EmbeddingReader.take` does.

        Raises:
            IndexError: A row or view does not exist.
            ValueError: A row was quarantined and has no embedding, or the number of views is not that of the rows.
        """
        rows, views = self._places.check(rows, view)
        at = rows if isinstance(view, int) and not view else views * self._places.total + rows
        if len(self._quarantined) and (bad := np.isin(at, self._quarantined)).any():
            raise ValueError(
                f"{self._name}: row {rows[bad][0]} was quarantined and has no embedding. Leave it out: "
                "EmbeddingReader.image_rows returns the rows that have one."
            )
        out = np.empty((len(rows), *self.rows.shape[1:]), self.rows.dtype)
        # "clip", since the rows were checked: with "raise" numpy gathers into a second array and copies it
        self.rows.take(at, axis=0, out=out, mode="clip")
        if self._scales is None:
            return out
        return unit_dequantized(out, self._scales[self._places.at(rows, views) // self._places.chunk_rows])


def load_resident(source: ChunkSource, tower: Tower, array: str) -> ResidentRows:
    """See :meth:`teacher_cache.storage.read.reader.EmbeddingReader.resident`."""
    source.require_array(tower, array)
    layout, places = source.layout, source.places(tower)
    threads = loads_at_once(source.files, _REMOTE_AHEAD)
    shape, dtype = stored_form(layout, tower, array)
    rows = np.empty((places.views * places.total, *shape[1:]), dtype)  # numpy asks for huge pages
    refs = [places.ref(number) for number in range(places.views * places.chunks)]
    columns = layout.embed_dim if dtype == np.int8 else 0
    scales, quarantined = np.empty((len(refs), columns), np.float32), [np.empty(0, np.int64)]

    def load(ref: ChunkRef) -> NDArray[Any]:
        if columns:
            scales[places.number(ref)] = source.scale(ref)[0]
        return source.load(ref, array)

    with ThreadPoolExecutor(threads, thread_name_prefix="read-ahead") as pool:
        for ref, values in zip(refs, results_ahead(pool, load, refs, max(_LEAST_AHEAD, threads)), strict=True):
            held = source.parts.rows(ref)
            first = ref.view * places.total + held.start
            rows[first : first + len(held)] = values[: len(held)]
            quarantined.append(source.quarantined_rows(ref) + first)
    name = f"{source.location}: {tower} {array}"
    return ResidentRows(rows, places, np.concatenate(quarantined), scales if columns else None, name)


def _write(descriptor: int, values: NDArray[Any]) -> None:
    data = np.ascontiguousarray(values).reshape(-1).view(np.uint8).data
    os.ftruncate(descriptor, max(1, len(data)))
    offset = 0
    while offset < len(data):
        offset += os.pwrite(descriptor, data[offset : offset + _WRITTEN_AT_ONCE], offset)


def _mapped(descriptor: int, shape: tuple[int, ...], dtype: str) -> NDArray[Any]:
    count = int(np.prod(shape))
    memory = mmap.mmap(descriptor, max(1, count * np.dtype(dtype).itemsize), prot=mmap.PROT_READ)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # not every system has huge pages for shared memory
            memory.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(memory, dtype, count=count).reshape(shape)


def _attach(
    descriptor: Any,
    shape: tuple[int, ...],
    dtype: str,
    places: RowPlaces,
    quarantined: NDArray[np.int64],
    scales: NDArray[np.float32] | None,
    name: str,
) -> ResidentRows:
    number = descriptor.detach()
    try:
        rows = _mapped(number, shape, dtype)
    except BaseException:
        os.close(number)
        raise
    return ResidentRows(rows, places, quarantined, scales, name, number)
