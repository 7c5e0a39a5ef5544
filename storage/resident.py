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

from storage.arrays import chunk_shape, stored_dtype
from storage.commits import ChunkRef, Tower
from storage.quantized import unit_dequantized
from storage.read_ahead import ReadAhead
from storage.shapes import SCALE

if TYPE_CHECKING:
    from storage.reader import EmbeddingReader

__all__ = ["ResidentRows"]

_AHEAD = 4  # chunks beyond the one that is copied


class ResidentRows:
    """One array of a cache in memory that processes share, proven when it was loaded.

    Made by :meth:`storage.reader.EmbeddingReader.resident`. A forked worker uses the memory of its parent; so does one
    that is spawned and gets this object among its arguments, or by a queue. The memory has no name: it ends with the
    last process that uses it, however that ends. Nobody writes to it; threads and processes may read at once.

    Attributes:
        rows: (rows, ...) read-only, of the stored dtype; of more than one view (views x rows, ...), view after view.
            Quarantined rows are NaN there, of int8 -128; :meth:`take` refuses them.
    """

    def __init__(
        self,
        descriptor: int,
        shape: tuple[int, ...],
        dtype: str,
        per_view: int,
        lost: NDArray[np.int64],
        steps: tuple[int, NDArray[np.float32]] | None,
        named: str,
    ) -> None:
        self._descriptor = descriptor
        self._shape, self._dtype, self._per_view, self._lost = shape, dtype, per_view, lost
        self._steps, self._named = steps, named
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        self._memory = mmap.mmap(descriptor, max(size, 1), prot=mmap.PROT_READ)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            with contextlib.suppress(OSError):  # where the system does not have them for shared memory
                self._memory.madvise(mmap.MADV_HUGEPAGE)
        self.rows: NDArray[Any] = np.frombuffer(self._memory, dtype, count=int(np.prod(shape))).reshape(shape)

    def __del__(self) -> None:
        descriptor, self._descriptor = getattr(self, "_descriptor", -1), -1
        if descriptor >= 0:
            os.close(descriptor)

    def __reduce__(self) -> tuple[Any, ...]:
        how = (self._shape, self._dtype, self._per_view, self._lost, self._steps, self._named)
        return _attach, (reduction.DupFd(self._descriptor), *how)

    @property
    def nbytes(self) -> int:
        """What it takes, in all processes together."""
        return self.rows.nbytes

    def take(self, rows: NDArray[np.int64], view: int | NDArray[np.int64] = 0) -> NDArray[Any]:
        """Rows in the order asked for, as a new array, as :meth:`EmbeddingReader.take` gives them.

        Raises:
            IndexError: a row or view that is not here.
            ValueError: a row that was quarantined and has no embedding.
        """
        rows = np.asarray(rows, np.int64)
        number = len(self.rows) // self._per_view if self._per_view else 0
        for what, values, stop in (("row", rows, self._per_view), ("view", np.asarray(view, np.int64), number)):
            if values.size and not 0 <= values.min() <= values.max() < stop:
                wrong = values[(values < 0) | (values >= stop)].reshape(-1)[0]
                raise IndexError(f"{self._named}: {what} {wrong} asked for, {what}s are 0 to {stop - 1}")
        at = rows if isinstance(view, int) and view == 0 else view * self._per_view + rows
        if len(self._lost) and np.isin(at, self._lost).any():
            first = int(np.flatnonzero(np.isin(at, self._lost))[0])
            raise ValueError(
                f"{self._named}: row {rows[first]} was quarantined and has no embedding. Leave it out: "
                "EmbeddingReader.image_rows names those that have one."
            )
        out = np.empty((len(rows), *self._shape[1:]), self._dtype)
        # the rows are known to be there; with "raise" numpy would gather into a second array and copy it
        np.take(self.rows, at, axis=0, out=out, mode="clip")
        if self._steps is None:
            return out
        size, steps = self._steps
        return unit_dequantized(out, steps[view * (len(steps) // number) + rows // size] if len(rows) else steps[:0])


def load_resident(reader: EmbeddingReader, tower: Tower, array: str, threads: int) -> ResidentRows:
    """See :meth:`storage.reader.EmbeddingReader.resident`."""
    layout = reader.manifest.layout
    views, number, size = (reader.views if tower == "image" else 1), reader._num_chunks(tower), layout.chunk_rows(tower)
    dtype, total = stored_dtype(layout, tower, array), layout.rows(tower)
    shape = (views * total, *chunk_shape(layout, tower, array)[1:])
    row_bytes = int(np.prod(shape[1:])) * dtype.itemsize
    descriptor = _unnamed()
    try:
        os.ftruncate(descriptor, max(1, shape[0] * row_bytes))
        lost: list[int] = []
        steps: list[NDArray[np.float32]] = []
        refs = [ChunkRef(tower, view, chunk) for view in range(views) for chunk in range(number)]

        def load(ref: ChunkRef) -> NDArray[Any]:
            return reader._load(ref, array)

        with ReadAhead(load, lambda ref: None, threads) as ahead:
            for at, ref in enumerate(refs):
                ahead.ask(refs[at : at + 1 + _AHEAD])
                rows = ref.rows(layout)
                _write(descriptor, ahead.get(ref)[: len(rows)], (ref.view * total + ref.chunk * size) * row_bytes)
                if dtype == np.int8:
                    steps.append(reader._chunk(ref, SCALE)[0])
                lost += (reader._lost(ref) + ref.view * total + rows.start).tolist()
                ahead.drop(keep=refs[at + 1 : at + 1 + _AHEAD])
        named = f"{reader.location}: {tower} {array}"
        columns = (size, np.stack(steps)) if steps else None
        return ResidentRows(descriptor, shape, dtype.str, total, np.array(lost, np.int64), columns, named)
    except BaseException:
        os.close(descriptor)
        raise


def _unnamed() -> int:
    """A file without a name, in memory where the system can."""
    if hasattr(os, "memfd_create"):
        return os.memfd_create("teacher-cache rows")
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


def _write(descriptor: int, values: NDArray[Any], offset: int) -> None:
    left = np.ascontiguousarray(values).reshape(-1).view(np.uint8).data
    while len(left):
        written = os.pwrite(descriptor, left, offset)
        left, offset = left[written:], offset + written


def _attach(descriptor: Any, *how: Any) -> ResidentRows:
    return ResidentRows(descriptor.detach(), *how)
