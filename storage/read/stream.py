"""Rows in an order that is known beforehand, batch by batch: each chunk read once, while earlier batches are used.

The other half of ``teacher_cache.storage.read.reader``. Batches are looked at ahead of their use. Threads load the
chunks that they need, within a budget of bytes; once no batch that is in sight needs a chunk it leaves, or its file
stays mapped for the next epoch. All rows of a batch are gathered by one call, of one copy a row.
"""

from __future__ import annotations

import math
import os
from collections import deque
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from teacher_cache.storage.errors import CacheCorruptError
from teacher_cache.storage.files.local import LocalFiles
from teacher_cache.storage.files.location import requests_at_once
from teacher_cache.storage.files.protocol import CacheFiles
from teacher_cache.storage.format.arrays import chunk_shape, prove_body, stored_dtype
from teacher_cache.storage.format.commits import ChunkRef
from teacher_cache.storage.format.int8 import unit_dequantized
from teacher_cache.storage.format.layout import CRC_BYTES, Tower
from teacher_cache.storage.read.mapped_chunks import ChunkRegion
from teacher_cache.storage.read.prefetch import ReadAhead

if TYPE_CHECKING:
    from teacher_cache.storage.read.reader import EmbeddingReader

__all__ = ["READ_AHEAD_BYTES", "Batch", "Prove", "loads_at_once", "stream_rows"]

READ_AHEAD_BYTES = 64 << 20
"""Of chunks that no batch has needed yet; of a store twice as much, half of it on its way."""

Batch = NDArray[np.int64] | tuple[NDArray[np.int64], NDArray[np.int64]]
"""Rows, or rows and one view for each."""

Prove = Literal["first", "every"]

_GROUP_ROWS = 8192  # for a group of batches all chunks are there before the first one
_LOOKED_AT_ROWS = 32_768  # at once: each call into numpy may have to wait for Python's lock
_ROWS_IN_SIGHT = 131_072  # at most, and a group
_MOST_MAPPED = 16_384  # chunks of one group; Linux maps some 65,000 files in a process
_MOST_KEPT = 4_096  # chunks of one array, each with a hole beside it at worst
_LOCAL_THREADS = 2


def loads_at_once(files: CacheFiles, ahead: int) -> int:
    """Threads that load chunks: of a store as many as are wanted on their way, since they wait for answers mostly.

    Args:
        ahead: chunks that are wanted on their way.
    """
    return max(_LOCAL_THREADS, min(requests_at_once(files), ahead))


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
    read_ahead_bytes: int | None,
    threads: int | None,
) -> Iterator[NDArray[Any]]:
    """See :meth:`teacher_cache.storage.read.reader.EmbeddingReader.stream`."""
    if read_ahead_bytes is None:
        read_ahead_bytes = READ_AHEAD_BYTES * (2 if requests_at_once(reader.files) > 1 else 1)
    if read_ahead_bytes < 0 or (threads is not None and threads < 1):
        raise ValueError(f"read_ahead_bytes={read_ahead_bytes}, threads={threads}: not negative, and 1 or more, wanted")
    reader._require_array(tower, array)
    chunks = _Chunks(reader, tower, array, prove)
    row_bytes = max(1, chunks.nbytes // chunks.size)
    most_at_once = _MOST_MAPPED if chunks.maps else max(1, reader._memory_bytes // chunks.nbytes)
    most_ahead = read_ahead_bytes // chunks.nbytes
    coming = _groups(reader, chunks, tower, batches)
    seen: deque[_Group] = deque()
    most_rows, rows = min(_ROWS_IN_SIGHT, (read_ahead_bytes + chunks.nbytes) // row_bytes), 0
    # half of them: answers do not come in the order of the questions, and those behind a late one must lie somewhere
    at_once = threads or loads_at_once(reader.files, most_ahead // 2)
    with chunks, ReadAhead(chunks.load, chunks.release, at_once) as ahead:
        while True:
            while not seen or rows < most_rows:
                group = next(coming, None)
                if group is None:
                    break
                seen.append(group)
                chunks.look_at(group.numbers)
                rows += group.rows
            if not seen:
                return
            now = seen[0]
            if len(now.numbers) > most_at_once:
                # an order that wants more chunks at once than there may be: one after the other
                for at in now.batches:
                    views, within = np.divmod(at, chunks.number * chunks.size)
                    yield reader.take(tower, within, views, array)
            else:
                needed = chunks.not_there(now.numbers)
                ahead.ask(needed)
                room = max(0, most_ahead - ahead.beside(needed))
                for group in islice(seen, 1, None):
                    more = [number for number in chunks.not_there(group.numbers) if number not in ahead]
                    ahead.ask(more[:room])
                    room -= len(more)
                    if room <= 0:
                        break
                for number in needed:
                    ahead.get(number)
                for number in chunks.require_there(now.numbers):
                    ahead.get(number)
                for at in now.batches:
                    yield chunks.gather(at)
            rows -= seen.popleft().rows
            ahead.drop(keep={number for group in seen for number in group.numbers})


class _Mapped(NamedTuple):
    """A chunk's file."""

    path: Path
    stored: bytes
    """The checksum that lies behind the chunk."""


class MappedChunks:
    """The addresses of one array's chunks and what stays mapped there from one epoch to the next.

    Files that are mapped first stay, as long as streams want them: in orders that go through all chunks again and again
    nothing else is better. Up to ``memory_bytes`` of a reader for each array, of the system's page cache: shared by all
    processes, and taken back when memory is wanted.
    """

    def __init__(self, chunks: int, shape: tuple[int, ...], dtype: np.dtype[Any], columns: int) -> None:
        self.region = ChunkRegion(chunks, shape, dtype)
        # of int8, by chunk: what one step of each column is
        self.steps = np.empty((chunks, columns), np.float32)
        self.kept: dict[int, _Mapped] = {}
        """The chunks that stay."""


class _Outputs:
    """New arrays, in memory of earlier ones that are gone: pages of the system's would have to be zeroed first.

    While an array, a view of it or a tensor over it is there, its bytearray cannot be resized.
    """

    def __init__(self, dtype: np.dtype[Any], kept: int = 3) -> None:
        self._dtype = dtype
        self._lent: deque[bytearray] = deque(maxlen=kept)

    def empty(self, shape: tuple[int, ...]) -> NDArray[Any]:
        count = math.prod(shape)
        size = count * self._dtype.itemsize + 1
        for memory in self._lent:
            if len(memory) == size and _is_given_back(memory):
                break
        else:
            memory = bytearray(size)
            self._lent.append(memory)
        return np.frombuffer(memory, self._dtype, count).reshape(shape)


def _is_given_back(memory: bytearray) -> bool:
    try:
        memory.append(memory.pop())
    except BufferError:
        return False
    return True


class _Chunks:
    """The chunks of one array, those in use in memory, proven."""

    def __init__(self, reader: EmbeddingReader, tower: Tower, array: str, prove: Prove) -> None:
        if prove not in ("first", "every"):
            raise ValueError(f"prove is {prove!r}, 'first' or 'every' wanted")
        layout = reader.manifest.layout
        self._reader, self._tower, self.array, self._prove = reader, tower, array, prove
        self._shape, self._dtype = chunk_shape(layout, tower, array), stored_dtype(layout, tower, array)
        self.size, self.number = layout.chunk_rows(tower), layout.chunks(tower)
        self.nbytes = int(np.prod(self._shape)) * self._dtype.itemsize
        self.views = reader._views(tower)
        # of another stream of this array that goes on beside this one the addresses are not shared
        kept: MappedChunks | None = reader._mapped.pop((tower, array), None)
        columns = layout.embed_dim if self._dtype == np.int8 else 0
        self.mapped = kept or MappedChunks(self.views * self.number, self._shape, self._dtype, columns)
        self.region, self._steps = self.mapped.region, self.mapped.steps
        self._local = isinstance(reader.files, LocalFiles)
        self.maps = self._local and self.region.maps_files
        self._most_kept = min(reader._memory_bytes // self.nbytes, _MOST_KEPT)
        # where a chunk is copied to: the place that was left last, since memory that is new costs more than the copy
        self._places = np.arange(self.views * self.number)
        self._free = list(reversed(range(self.views * self.number)))
        self._proven: dict[int, _Mapped] = {}  # files that are mapped and may stay
        self._used: set[int] = set()
        self._copied: set[int] = set()
        # that have a quarantined row
        damaged = [commit.ref for commit in reader._commits.with_quarantined() if commit.tower == tower]
        self.lost = {ref.view * self.number + ref.chunk for ref in damaged}
        self._wanted: set[int] = set()
        self._coming: set[int] = set()  # what the group looked at last needs
        self._here: set[int] = set()  # what the group before needed
        self._taken_back: set[int] = set()  # of it pages had to be read again
        self._too_many = False  # more than may stay mapped
        self._outputs = _Outputs(self._dtype)
        self._process = os.getpid()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        """Leave what is mapped to the next stream of this array, unless something may still be done to it."""
        if not self.maps or os.getpid() != self._process or kind not in (None, GeneratorExit):
            return
        if self._too_many:  # room for those that are in use now
            for number in self.mapped.kept.keys() - self._wanted:
                del self.mapped.kept[number]
                self.region.release(number)
        self._reader._mapped[self._tower, self.array] = self.mapped

    def ref(self, number: int) -> ChunkRef:
        return ChunkRef(self._tower, *divmod(number, self.number))

    def numbers(self, chunk: NDArray[np.int64]) -> list[int]:
        """Each number once, ascending."""
        found = np.zeros(self.views * self.number, bool)
        found[chunk] = True
        return np.flatnonzero(found).tolist()

    def not_there(self, numbers: list[int]) -> list[int]:
        """Those of some chunks that have to be loaded."""
        kept = self.mapped.kept
        if not kept or self._prove == "every":
            return numbers
        return [number for number in numbers if number not in kept]

    def load(self, number: int) -> None:
        """Bring a chunk into memory; in a thread."""
        ref, reader = self.ref(number), self._reader
        if self._dtype == np.int8 and number not in self.mapped.kept:
            self._steps[number] = reader._step(ref)[0]
        if self.maps and self._map(number, ref):
            return
        if self._local:
            self.region.fill(number, reader._load(ref, self.array))
            return
        values = reader._chunk(ref, self.array)
        place = self._free.pop()
        self.region.fill(place, values, again=place in self._used)
        self._used.add(place)
        self._copied.add(number)
        self._places[number] = place

    def release(self, number: int) -> None:
        """Let go of a chunk; where others will be copied to its place, that stays as it is."""
        kept = self.mapped.kept
        if number in kept:
            return
        proven = self._proven.pop(number, None)
        if proven is not None and len(kept) < self._most_kept:
            kept[number] = proven
        elif number in self._copied:
            self._copied.remove(number)
            self._free.append(int(self._places[number]))
        else:
            self._too_many = self._too_many or proven is not None
            self.region.release(number)

    def look_at(self, numbers: list[int]) -> None:
        """Of what stayed mapped, these are wanted soon: their pages are read if the system has taken them back."""
        self._wanted.update(numbers)
        for number in (self.mapped.kept.keys() & numbers) - self._coming:
            if self.region.will_need(number):
                self._taken_back.add(number)
        self._coming = set(numbers)

    def require_there(self, numbers: list[int]) -> list[int]:
        """Those of what stayed mapped that can no longer be read: a disk failed, or a file was cut short since."""
        gone = []
        for number in (self.mapped.kept.keys() & numbers) - self._here:
            try:
                whole = self.mapped.kept[number].path.stat().st_size == self.nbytes + CRC_BYTES
            except OSError:
                whole = True  # what is mapped is there without its name
            if not whole or (number in self._taken_back and not self.region.can_be_read(number)):
                del self.mapped.kept[number]
                gone.append(number)
            self._taken_back.discard(number)
        self._here = set(numbers)
        return gone

    def _map(self, number: int, ref: ChunkRef) -> bool:
        """Whether the chunk's file could be mapped. Why it could not, reading it will say."""
        files = self._reader.files
        assert isinstance(files, LocalFiles)
        key = ref.object_keys(self._reader.manifest.layout)[self.array]
        wanted = self._reader._commits.digest(ref, self.array)
        mapped = self.mapped.kept.get(number)
        if mapped is None:
            if wanted.nbytes != self.nbytes + CRC_BYTES:
                return False
            try:
                path = files.path(key)
                mapped = _Mapped(Path(path), self.region.map(number, path, wanted.nbytes))
            except OSError:
                return False
        proven = (ref, self.array) in self._reader._proven
        # the checksum beside it costs nothing to look at, and tells a file that another took the place of
        if self._prove == "every" or not proven or int.from_bytes(mapped.stored, "little") != wanted.crc32c:
            values = self.region.chunk(number)
            try:
                some_nan = prove_body(values, mapped.stored, wanted, f"{files.location}/{key}", not proven)
            except CacheCorruptError:
                if self.mapped.kept.pop(number, None) is None:
                    raise
                return self._map(number, ref)  # the file that is there now may be a mended one
            if not proven:
                self._reader._note_proven(ref, self.array, values, some_nan)
        if number not in self.mapped.kept:
            self._proven[number] = mapped
        self._reader._count(wanted.nbytes)
        return True

    def gather(self, at: NDArray[np.int64]) -> NDArray[Any]:
        """Rows of chunks that are in memory, counted over all chunks, as a new array."""
        place = at
        if not self._local:
            chunk, within = np.divmod(at, self.size)
            place = self._places[chunk] * self.size + within
        out = self._outputs.empty((len(at), *self._shape[1:]))
        # the rows are known to be there; with "raise" numpy would gather into a second array and copy it
        np.take(self.region.rows, place, axis=0, out=out, mode="clip")
        return unit_dequantized(out, self._steps[at // self.size]) if self._dtype == np.int8 else out


def _groups(reader: EmbeddingReader, chunks: _Chunks, tower: Tower, batches: Iterable[Batch]) -> Iterator[_Group]:
    """The batches in groups; each row, view and quarantine is looked at here, for many batches at once."""
    some: list[Batch] = []
    count = 0
    for batch in batches:
        some.append(batch)
        count += len(batch[0] if isinstance(batch, tuple) else batch)
        if count >= _LOOKED_AT_ROWS:
            yield from _looked_at(reader, chunks, tower, some)
            some, count = [], 0
    if some:
        yield from _looked_at(reader, chunks, tower, some)


def _looked_at(reader: EmbeddingReader, chunks: _Chunks, tower: Tower, batches: list[Batch]) -> Iterator[_Group]:
    views: NDArray[np.int64] = np.zeros((), np.int64)
    if any(isinstance(batch, tuple) for batch in batches):
        pairs = [reader._checked(tower, *(batch if isinstance(batch, tuple) else (batch, 0))) for batch in batches]
        parts = [rows for rows, _ in pairs]
        views = np.concatenate([np.broadcast_to(some, rows.shape) for rows, some in pairs])
    else:
        parts = [np.asarray(batch, np.int64) for batch in batches]
    rows, views = reader._checked(tower, np.concatenate(parts), views)
    chunk, at = rows // chunks.size, rows
    if views.any():
        chunk, at = views * chunks.number + chunk, views * (chunks.number * chunks.size) + at
    if chunks.lost and not chunks.lost.isdisjoint(chunks.numbers(chunk)):
        reader._require_encoded(tower, rows, views, chunks.array)
    within: list[NDArray[np.int64]] = []
    first = start = 0
    for last, part in enumerate(parts, 1):
        stop = start + len(part)
        within.append(at[start:stop])
        start = stop
        if stop - first >= _GROUP_ROWS or last == len(parts):
            yield _Group(within, stop - first, chunks.numbers(chunk[first:stop]))
            within, first = [], stop
