"""All rows of one array in memory, once for all processes of a machine: for orders that are random altogether."""

from __future__ import annotations

import contextlib
import mmap
import os
import tempfile
from multiprocessing import reduction
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from teacher_cache.storage.format.arrays import chunk_shape, stored_dtype
from teacher_cache.storage.format.commits import ChunkRef
from teacher_cache.storage.format.int8 import unit_dequantized
from teacher_cache.storage.format.layout import Tower
from teacher_cache.storage.read.prefetch import ReadAhead
from teacher_cache.storage.read.stream import loads_at_once

if TYPE_CHECKING:
    from teacher_cache.storage.read.reader import EmbeddingReader

__all__ = ["ResidentRows", "load_resident"]

_LEAST_AHEAD = 4  # chunks beyond the one that is copied
_REMOTE_AHEAD = 16  # and of a store
_WRITTEN_AT_ONCE = 1 << 28  # bytes


class ResidentRows:
    """One array of a cache in memory that processes share, proven when it was loaded.

    Made by :meth:`teacher_cache.storage.read.reader.EmbeddingReader.resident`. The rows are private memory, in huge
    pages where the system has them, which forked workers share with their parent, for nobody writes to it. Once this
    object is given to a spawned worker, among its arguments or by a queue, they move to memory that has a descriptor;
    while they move they are there twice. That memory has no name: it ends with the last process that uses it, however
    that ends. Threads and processes may read at once.

    Attributes:
        rows: (rows, ...) read-only, of the stored dtype; of more than one view (views x rows, ...), view after view.
            Quarantined rows are NaN there, of int8 -128; :meth:`take` refuses them.
    """

    def __init__(
        self,
        rows: NDArray[Any],
        per_view: int,
        lost: NDArray[np.int64],
        steps: tuple[int, NDArray[np.float32]] | None,
        named: str,
        descriptor: int = -1,
    ) -> None:
        """For :meth:`teacher_cache.storage.read.reader.EmbeddingReader.resident`.

        Args:
            rows: kept, and read-only from now on.
            per_view: rows of one view.
            lost: which of ``rows`` were quarantined.
            steps: of int8: rows per chunk, and by chunk, view after view, what one step of each column is.
            named: for messages.
            descriptor: of the memory that the rows lie in, if it has one; closed with this object.
        """
        rows.flags.writeable = False
        self.rows, self._per_view, self._lost, self._steps, self._named = rows, per_view, lost, steps, named
        self._descriptor = descriptor

    def __del__(self) -> None:
        descriptor, self._descriptor = getattr(self, "_descriptor", -1), -1
        if descriptor >= 0:
            os.close(descriptor)

    def __reduce__(self) -> tuple[Any, ...]:
        if self._descriptor < 0:
            self._move()
        how = (self.rows.shape, self.rows.dtype.str, self._per_view, self._lost, self._steps, self._named)
        return _attach, (reduction.DupFd(self._descriptor), *how)

    def _move(self) -> None:
        descriptor = _unnamed()
        try:
            _write(descriptor, self.rows)
            rows = _mapped(descriptor, self.rows.shape, self.rows.dtype.str)
        except BaseException:
            os.close(descriptor)
            raise
        self.rows, self._descriptor = rows, descriptor

    @property
    def nbytes(self) -> int:
        """What it takes, in all processes together."""
        return self.rows.nbytes

    def take(self, rows: NDArray[np.int64], view: int | NDArray[np.int64] = 0) -> NDArray[Any]:
        """Rows in the order asked for, as a new array, as :meth:`EmbeddingReader.take` gives them.

        Raises:
            IndexError: a row or view that is not here.
            ValueError: a row that was quarantined and has no embedding; as many views as rows are wanted.
        """
        at = rows = np.asarray(rows, np.int64)
        views = np.asarray(view, np.int64)
        if views.shape not in ((), rows.shape):
            raise ValueError(
                f"{len(rows)} rows and views of shape {views.shape}: one view, or one for each row, wanted"
            )
        self._require("row", rows, self._per_view)
        if not isinstance(view, int) or view:
            self._require("view", views, len(self.rows) // max(1, self._per_view))
            at = views * self._per_view + rows
        if len(self._lost) and np.isin(at, self._lost).any():
            first = int(np.flatnonzero(np.isin(at, self._lost))[0])
            raise ValueError(
                f"{self._named}: row {rows[first]} was quarantined and has no embedding. Leave it out: "
                "EmbeddingReader.image_rows names those that have one."
            )
        out = np.empty((len(rows), *self.rows.shape[1:]), self.rows.dtype)
        # the rows are known to be there; with "raise" numpy would gather into a second array and copy it
        self.rows.take(at, axis=0, out=out, mode="clip")
        if self._steps is None or not len(rows):
            return out if self._steps is None else out.astype(np.float32)
        size, steps = self._steps
        return unit_dequantized(out, steps[views * -(-self._per_view // size) + rows // size])

    def _require(self, what: str, values: NDArray[np.int64], stop: int) -> None:
        # negative ones are large without a sign: one pass
        if values.size and values.view(np.uint64).max() >= stop:
            wrong = values[(values < 0) | (values >= stop)].reshape(-1)[0]
            raise IndexError(f"{self._named}: {what} {wrong} asked for, {what}s are 0 to {stop - 1}")


def load_resident(reader: EmbeddingReader, tower: Tower, array: str, threads: int | None) -> ResidentRows:
    """See :meth:`teacher_cache.storage.read.reader.EmbeddingReader.resident`."""
    reader._require_array(tower, array)
    layout = reader.manifest.layout
    threads = threads or loads_at_once(reader.files, _REMOTE_AHEAD)
    most_ahead = max(_LEAST_AHEAD, threads)
    dtype, total = stored_dtype(layout, tower, array), layout.rows(tower)
    shape = (reader._views(tower) * total, *chunk_shape(layout, tower, array)[1:])
    rows, lost = np.empty(shape, dtype), []  # numpy asks for huge pages
    steps: list[NDArray[np.float32]] = []
    refs = [
        ChunkRef(tower, view, chunk) for view in range(reader._views(tower)) for chunk in range(layout.chunks(tower))
    ]

    def load(ref: ChunkRef) -> tuple[NDArray[Any], NDArray[np.float32] | None]:
        return reader._load(ref, array), reader._step(ref) if dtype == np.int8 else None

    with ReadAhead(load, lambda ref: None, threads) as ahead:
        for at, ref in enumerate(refs):
            ahead.ask(refs[at : at + 1 + most_ahead])
            here = ref.rows(layout)
            first = ref.view * total + here.start
            values, step = ahead.get(ref)
            rows[first : first + len(here)] = values[: len(here)]
            if step is not None:
                steps.append(step[0])
            lost += (reader._lost(ref) + first).tolist()
            ahead.drop(keep=refs[at + 1 : at + 1 + most_ahead])
    columns = (layout.chunk_rows(tower), np.stack(steps)) if steps else None
    return ResidentRows(rows, total, np.array(lost, np.int64), columns, f"{reader.location}: {tower} {array}")


def _unnamed() -> int:
    """A file without a name, in memory where the system can."""
    if hasattr(os, "memfd_create"):
        return os.memfd_create("teacher-cache rows")
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


def _write(descriptor: int, values: NDArray[Any]) -> None:
    left = np.ascontiguousarray(values).reshape(-1).view(np.uint8).data
    os.ftruncate(descriptor, max(1, len(left)))
    offset = 0
    while offset < len(left):
        offset += os.pwrite(descriptor, left[offset : offset + _WRITTEN_AT_ONCE], offset)


def _mapped(descriptor: int, shape: tuple[int, ...], dtype: str) -> NDArray[Any]:
    count = int(np.prod(shape))
    memory = mmap.mmap(descriptor, max(1, count * np.dtype(dtype).itemsize), prot=mmap.PROT_READ)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # where the system has none for shared memory
            memory.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(memory, dtype, count=count).reshape(shape)


def _attach(
    descriptor: Any,
    shape: tuple[int, ...],
    dtype: str,
    per_view: int,
    lost: NDArray[np.int64],
    steps: tuple[int, NDArray[np.float32]] | None,
    named: str,
) -> ResidentRows:
    number = descriptor.detach()
    try:
        rows = _mapped(number, shape, dtype)
    except BaseException:
        os.close(number)
        raise
    return ResidentRows(rows, per_view, lost, steps, named, number)
