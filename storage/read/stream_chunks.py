"""Chunks that a stream has in memory, in one region, so that one call gathers rows of many chunks.

Files of a local cache are mapped (:class:`MappedChunks`); other chunks, and compressed ones, are copied
(:class:`CopiedChunks`).
"""

from __future__ import annotations

import math
import os
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from teacher_cache.storage.errors import CacheCorruptError
from teacher_cache.storage.files.local import LocalFiles
from teacher_cache.storage.format.arrays import stored_form
from teacher_cache.storage.format.int8 import unit_dequantized
from teacher_cache.storage.format.layout import CRC_BYTES, Tower
from teacher_cache.storage.read.chunk_region import ChunkRegion
from teacher_cache.storage.read.chunks import ChunkSource

_MOST_MAPPED = 16_384  # chunks of one group; Linux maps some 65,000 files in a process
_MOST_KEPT = 4_096  # chunks of one array; each takes two mappings at worst, its own and the gap behind it


class OutputArrays:
    """New arrays in the memory of unused earlier ones: the system would have to zero new pages.

    Memory is in use while its bytearray cannot be resized: an array, a view or a tensor over it exists.
    """

    def __init__(self, dtype: np.dtype[Any]) -> None:
        self._dtype = dtype
        self._buffers: deque[bytearray] = deque(maxlen=3)

    def empty(self, shape: tuple[int, ...]) -> NDArray[Any]:
        """Return an array of this shape with any contents."""
        count = math.prod(shape)
        size = count * self._dtype.itemsize + 1
        for memory in self._buffers:
            if len(memory) == size and _is_unused(memory):
                break
        else:
            memory = bytearray(size)
            self._buffers.append(memory)
        return np.frombuffer(memory, self._dtype, count).reshape(shape)


def _is_unused(memory: bytearray) -> bool:
    try:
        memory.append(memory.pop())
    except BufferError:
        return False
    return True


class _MappedFile(NamedTuple):
    """Mapped file of a chunk."""

    path: Path
    checksum: bytes
    """Bytes behind the chunk in the file."""


@dataclass
class MappedArray:
    """Region of one array and the files that stay mapped there between streams.

    The files mapped first stay mapped while streams use them: no other rule is better if every epoch reads all chunks.
    They take up to ``memory_bytes`` of a reader for each array, in the system's page cache: shared by all processes,
    and reclaimed under memory pressure.

    Attributes:
        scales: For int8, the step of each column by chunk, (chunks, dim).
        files: Mapped files by chunk number.
    """

    region: ChunkRegion
    scales: NDArray[np.float32]
    files: dict[int, _MappedFile] = field(default_factory=dict)


class StreamChunks:
    """Chunks of one array by number, loaded by threads and gathered by the stream; a context manager.

    Args:
        memory: Memory for the chunks.

    Attributes:
        nbytes: Bytes of one chunk.
        most_at_once: Chunks that can be in memory together.
    """

    most_at_once: int

    def __init__(self, source: ChunkSource, tower: Tower, array: str, memory: MappedArray) -> None:
        self.places, self.array = source.places(tower), array
        self.nbytes = memory.region.chunk_bytes
        self._source, self._memory = source, memory
        self._int8 = memory.region.rows.dtype == np.int8
        self._outputs = OutputArrays(memory.region.rows.dtype)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        """Do nothing; a subclass may release what it holds."""

    def load(self, number: int) -> None:
        """Load and prove a chunk. Called by several threads, for different chunks."""
        if self._int8:
            self._memory.scales[number] = self._source.scale(self.places.ref(number))[0]
        self._bring(number)

    def _bring(self, number: int) -> None:
        raise NotImplementedError

    def release(self, number: int) -> None:
        """Release a loaded chunk."""
        raise NotImplementedError

    def to_load(self, numbers: list[int]) -> list[int]:
        """Return the chunks that have to be loaded."""
        return numbers

    def expect(self, numbers: list[int]) -> None:
        """Prepare for chunks that a later group of batches needs."""

    def unreadable(self, numbers: list[int]) -> list[int]:
        """Return the chunks that have to be loaded again: they stayed mapped and cannot be read now."""
        return []

    def gather(self, at: NDArray[np.int64]) -> NDArray[Any]:
        """Return rows of chunks in memory as a new array; ``at`` counts the rows of all chunks, padding included."""
        out = self._outputs.empty((len(at), *self._memory.region.rows.shape[1:]))
        # "clip", since the rows were checked: with "raise" numpy gathers into a second array and copies it
        np.take(self._memory.region.rows, self._positions(at), axis=0, out=out, mode="clip")
        return unit_dequantized(out, self._memory.scales[at // self.places.chunk_rows]) if self._int8 else out

    def _positions(self, at: NDArray[np.int64]) -> NDArray[np.int64]:
        return at


class CopiedChunks(StreamChunks):
    """Chunks of a store, or of files that cannot be mapped or are compressed, copied into the region.

    A chunk is copied to the place that was freed last, since new memory costs more than the copy. The source also
    keeps chunks of a store in memory.
    """

    def __init__(self, source: ChunkSource, tower: Tower, array: str, memory: MappedArray) -> None:
        super().__init__(source, tower, array, memory)
        count = self.places.views * self.places.chunks
        self.most_at_once = max(1, source.memory_bytes // self.nbytes)
        self._place_of = np.arange(count)
        self._free = list(reversed(range(count)))
        self._used: set[int] = set()
        self._load = source.load if isinstance(source.files, LocalFiles) else source.chunk

    def _bring(self, number: int) -> None:
        values = self._load(self.places.ref(number), self.array)
        place = self._free.pop()
        self._memory.region.fill(place, values, again=place in self._used)
        self._used.add(place)
        self._place_of[number] = place

    def release(self, number: int) -> None:
        """Free the place of a chunk for another one."""
        self._free.append(int(self._place_of[number]))

    def _positions(self, at: NDArray[np.int64]) -> NDArray[np.int64]:
        chunk, within = np.divmod(at, self.places.chunk_rows)
        return self._place_of[chunk] * self.places.chunk_rows + within


class MappedChunks(StreamChunks):
    """Chunk files of a local cache, mapped; as many as the reader's budget allows stay mapped for the next stream."""

    most_at_once = _MOST_MAPPED

    def __init__(
        self, source: ChunkSource, tower: Tower, array: str, memory: MappedArray, prove_every_read: bool
    ) -> None:
        super().__init__(source, tower, array, memory)
        self._tower, self._prove_every_read = tower, prove_every_read
        self._most_kept = min(source.memory_bytes // self.nbytes, _MOST_KEPT)
        self._loaded: dict[int, _MappedFile] = {}
        self._used: set[int] = set()
        self._expected: set[int] = set()  # chunks of the group read ahead last
        self._current: set[int] = set()  # chunks of the group that is gathered
        self._evicted: set[int] = set()  # chunks of which the system had evicted pages
        self._budget_exceeded = False
        self._process = os.getpid()

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        """Keep the mapped files for the next stream of this array, unless there was an error."""
        if os.getpid() != self._process or kind not in (None, GeneratorExit):
            return
        if self._budget_exceeded:  # make room for the files that are in use now
            for number in self._memory.files.keys() - self._used:
                del self._memory.files[number]
                self._memory.region.release(number)
        self._source.mapped[self._tower, self.array] = self._memory

    def load(self, number: int) -> None:
        """Map a chunk's file. If it stayed mapped, its scales are known."""
        if number in self._memory.files:
            self._bring(number)
        else:
            super().load(number)

    def _bring(self, number: int) -> None:
        if not self._map(number):  # reading the file raises the reason
            self._memory.region.fill(number, self._source.load(self.places.ref(number), self.array))

    def _map(self, number: int) -> bool:
        """Map and prove a chunk's file; return False where it cannot be mapped."""
        ref, stayed = self.places.ref(number), self._memory.files.get(number)
        nbytes = self._source.digest(ref, self.array).nbytes
        file = stayed or self._opened(number, nbytes)
        if file is None:
            return False
        try:
            body = self._memory.region.chunk(number)
            self._source.prove(ref, self.array, body, file.checksum, self._prove_every_read)
        except CacheCorruptError:
            if stayed is None:
                raise
            del self._memory.files[number]
            return self._map(number)  # the file may have been repaired since
        if stayed is None:
            self._loaded[number] = file
        self._source.count(nbytes)
        return True

    def _opened(self, number: int, nbytes: int) -> _MappedFile | None:
        if nbytes != self.nbytes + CRC_BYTES:
            return None
        files, key = self._source.object(self.places.ref(number), self.array)
        assert isinstance(files, LocalFiles)
        path = files.path(key)
        try:
            return _MappedFile(Path(path), self._memory.region.map(number, path, nbytes))
        except OSError:
            return None

    def release(self, number: int) -> None:
        """Unmap a chunk, unless it may stay mapped."""
        files = self._memory.files
        if number in files:
            return
        file = self._loaded.pop(number, None)
        if file is not None and len(files) < self._most_kept:
            files[number] = file
            return
        self._budget_exceeded = self._budget_exceeded or file is not None
        self._memory.region.release(number)

    def to_load(self, numbers: list[int]) -> list[int]:
        """Return the chunks that did not stay mapped, or all if every read is proven."""
        if self._prove_every_read or not self._memory.files:
            return numbers
        return [number for number in numbers if number not in self._memory.files]

    def expect(self, numbers: list[int]) -> None:
        """Prefetch pages of mapped files that the system has evicted."""
        self._used.update(numbers)
        for number in (self._memory.files.keys() & numbers) - self._expected:
            if self._memory.region.will_need(number):
                self._evicted.add(number)
        self._expected = set(numbers)

    def unreadable(self, numbers: list[int]) -> list[int]:
        """Unmap and return the mapped chunks whose file was cut short or whose disk failed since."""
        gone = []
        for number in (self._memory.files.keys() & numbers) - self._current:
            if not self._is_whole(number):
                del self._memory.files[number]
                gone.append(number)
            self._evicted.discard(number)
        self._current = set(numbers)
        return gone

    def _is_whole(self, number: int) -> bool:
        try:
            if self._memory.files[number].path.stat().st_size != self.nbytes + CRC_BYTES:
                return False
        except OSError:
            pass  # a mapped file needs no name
        return number not in self._evicted or self._memory.region.can_be_read(number)


def open_chunks(source: ChunkSource, tower: Tower, array: str, prove_every_read: bool) -> StreamChunks:
    """Return the chunks of an array for one stream."""
    # popped, so that a concurrent stream of this array gets its own region
    memory = source.mapped.pop((tower, array), None) or _new_array(source, tower, array)
    mappable = isinstance(source.files, LocalFiles) and source.layout.compressor is None
    if memory.region.maps_files and mappable:
        return MappedChunks(source, tower, array, memory, prove_every_read)
    return CopiedChunks(source, tower, array, memory)


def _new_array(source: ChunkSource, tower: Tower, array: str) -> MappedArray:
    places, (shape, dtype) = source.places(tower), stored_form(source.layout, tower, array)
    chunks = places.views * places.chunks
    columns = source.layout.embed_dim if dtype == np.int8 else 0
    return MappedArray(ChunkRegion(chunks, shape, dtype), np.empty((chunks, columns), np.float32))
