"""Rows in an order that is known beforehand, batch by batch: each chunk read once, while earlier batches are used.

The other half of ``storage.reader``. Batches are looked at ahead of their use. Threads load the chunks that they need,
within a budget of bytes; a chunk leaves once no batch that is in sight needs it. All rows of a batch are gathered by
one call, of one copy a row.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from itertools import islice, pairwise
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from storage.arrays import array_dtype, chunk_shape, prove_body
from storage.chunk_region import ChunkRegion
from storage.commits import ChunkRef, Tower
from storage.files import requests_at_once
from storage.local_files import LocalFiles
from storage.read_ahead import ReadAhead

if TYPE_CHECKING:
    from storage.reader import EmbeddingReader

__all__ = ["READ_AHEAD_BYTES", "Batch", "Prove", "stream_rows"]

READ_AHEAD_BYTES = 64 << 20
"""Of chunks that no batch has needed yet."""

Batch = NDArray[np.int64] | tuple[NDArray[np.int64], NDArray[np.int64]]
"""Rows, or rows and one view for each."""

Prove = Literal["first", "every"]

_GROUP_ROWS = 8192  # batches are looked at in groups of so many rows
_LOCAL_THREADS = 2


class _Group(NamedTuple):
    """Some batches, in their order."""

    batches: list[NDArray[np.int64]]
    """Their rows as places in the region: view x rows of a view, the last chunk's padding included, + row."""
    rows: int
    numbers: list[int]
    """The chunks that they need: view x chunks of a view + chunk."""


def stream_rows(
    reader: EmbeddingReader,
    tower: Tower,
    batches: Iterable[Batch],
    array: str,
    prove: Prove,
    read_ahead_bytes: int,
    threads: int | None,
) -> Iterator[NDArray[Any]]:
    """See :meth:`storage.reader.EmbeddingReader.stream`."""
    chunks = _Chunks(reader, tower, array, prove)
    row_bytes = max(1, chunks.nbytes // chunks.size)
    most_in_memory = max(1, reader._memory_bytes // chunks.nbytes)
    coming = _groups(reader, chunks, tower, batches)
    seen: deque[_Group] = deque()
    # of a store as many are on their way as may lie ready; its threads wait for answers, most of the time
    loads = max(_LOCAL_THREADS, min(requests_at_once(reader.files), read_ahead_bytes // chunks.nbytes))
    with ReadAhead(chunks.load, chunks.release, threads or loads) as ahead:
        while True:
            while not seen or sum(group.rows for group in seen) * row_bytes < read_ahead_bytes + chunks.nbytes:
                group = next(coming, None)
                if group is None:
                    break
                seen.append(group)
            if not seen:
                return
            now = seen[0]
            if len(now.numbers) > most_in_memory and not chunks.region.maps_files:
                # an order that wants more chunks at once than there may be in memory: one after the other
                for at in now.batches:
                    views, rows = np.divmod(at, chunks.number * chunks.size)
                    yield reader.take(tower, rows, views, array)
            else:
                ahead.ask(now.numbers)
                room = read_ahead_bytes // chunks.nbytes
                for group in islice(seen, 1, None):
                    more = [number for number in group.numbers if number not in ahead]
                    ahead.ask(more[:room])
                    room -= len(more)
                    if room <= 0:
                        break
                for number in now.numbers:
                    ahead.get(number)
                for at in now.batches:
                    yield chunks.gather(at)
            seen.popleft()
            ahead.drop(keep={number for group in seen for number in group.numbers})


class _Chunks:
    """The chunks of one array, those in use in memory, proven."""

    def __init__(self, reader: EmbeddingReader, tower: Tower, array: str, prove: Prove) -> None:
        if prove not in ("first", "every"):
            raise ValueError(f"prove is {prove!r}, 'first' or 'every' wanted")
        layout = reader.manifest.layout
        self._reader, self._tower, self.array, self._prove = reader, tower, array, prove
        self._shape, self._dtype = chunk_shape(layout, tower, array), array_dtype(tower, array)
        self.size, self.number = layout.chunk_rows(tower), reader._num_chunks(tower)
        self.nbytes = int(np.prod(self._shape)) * self._dtype.itemsize
        self.views = reader.views if tower == "image" else 1
        self.region = ChunkRegion(self.views * self.number, self._shape, self._dtype)
        # where a chunk is copied to: the place that was left last, since memory that is new costs more than the copy
        self._places = np.arange(self.views * self.number)
        self._free = list(reversed(range(self.views * self.number)))
        self._used: set[int] = set()
        self._copied: set[int] = set()

    def ref(self, number: int) -> ChunkRef:
        return ChunkRef(self._tower, *divmod(number, self.number))

    def load(self, number: int) -> None:
        """Bring a chunk into memory; in a thread."""
        ref, reader = self.ref(number), self._reader
        if self.region.maps_files and isinstance(reader.files, LocalFiles) and self._map(reader.files, number, ref):
            return
        values = reader._chunk(ref, self.array)
        if isinstance(reader.files, LocalFiles):
            self.region.fill(number, values)
            return
        place = self._free.pop()
        self.region.fill(place, values, again=place in self._used)
        self._used.add(place)
        self._copied.add(number)
        self._places[number] = place

    def release(self, number: int) -> None:
        """Let go of a chunk; where others will be copied to its place, that stays as it is."""
        if number in self._copied:
            self._copied.remove(number)
            self._free.append(int(self._places[number]))
        else:
            self.region.release(number)

    def _map(self, files: LocalFiles, number: int, ref: ChunkRef) -> bool:
        """Whether the chunk's file could be mapped. Why it could not, reading it will say."""
        key = ref.object_keys()[self.array]
        wanted = self._reader._commits[ref].objects[self.array]
        try:
            stored = self.region.map(number, files.path(key), wanted.nbytes)
        except OSError:
            return False
        proven = (ref, self.array) in self._reader._proven
        if self._prove == "every" or not proven:
            values = self.region.chunk(number)
            some_nan = prove_body(values, stored, wanted, f"{files.location}/{key}", look_for_nan=not proven)
            if not proven:
                self._reader._note_proven(ref, self.array, values, some_nan)
        self._reader._count(wanted.nbytes)
        return True

    def gather(self, at: NDArray[np.int64]) -> NDArray[Any]:
        """Rows of chunks that are in memory, as a new array."""
        if not isinstance(self._reader.files, LocalFiles):
            number, within = np.divmod(at, self.size)
            at = self._places[number] * self.size + within
        out = np.empty((len(at), *self._shape[1:]), self._dtype)
        # the rows are known to be there; with "raise" numpy would gather into a second array and copy it
        return np.take(self.region.rows, at, axis=0, out=out, mode="clip")


def _groups(reader: EmbeddingReader, chunks: _Chunks, tower: Tower, batches: Iterable[Batch]) -> Iterator[_Group]:
    """The batches in groups; each row, view and quarantine is looked at here, for many batches at once."""
    some: list[Batch] = []
    count = 0
    for batch in batches:
        some.append(batch)
        count += len(batch[0] if isinstance(batch, tuple) else batch)
        if count >= _GROUP_ROWS:
            yield _group(reader, chunks, tower, some)
            some, count = [], 0
    if some:
        yield _group(reader, chunks, tower, some)


def _group(reader: EmbeddingReader, chunks: _Chunks, tower: Tower, batches: list[Batch]) -> _Group:
    views: NDArray[np.int64] = np.zeros((), np.int64)
    if any(isinstance(batch, tuple) for batch in batches):
        pairs = [reader._checked(tower, *(batch if isinstance(batch, tuple) else (batch, 0))) for batch in batches]
        parts = [rows for rows, _ in pairs]
        views = np.concatenate([np.broadcast_to(some, rows.shape) for rows, some in pairs])
    else:
        parts = [np.asarray(batch, np.int64) for batch in batches]
    rows, views = reader._checked(tower, np.concatenate(parts), views)
    needed = np.zeros(chunks.views * chunks.number, bool)
    needed[views * chunks.number + rows // chunks.size] = True
    numbers = np.flatnonzero(needed).tolist()
    if any(reader._commits[chunks.ref(number)].quarantined for number in numbers):
        reader._require_encoded(tower, rows, views, chunks.array)
    at = views * (chunks.number * chunks.size) + rows
    stops = np.cumsum([len(part) for part in parts]).tolist()
    return _Group([at[start:stop] for start, stop in pairwise([0, *stops])], len(rows), numbers)
