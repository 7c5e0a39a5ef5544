"""Streams of rows in a known order: chunks are prefetched, each once, while earlier batches are used.

Threads prefetch the chunks of the next batches, within a budget of bytes. A chunk is released when none of these
batches needs it, or its file stays mapped for the next epoch. One call gathers the rows of a batch, with one copy per
row.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from teacher_cache.storage.files.location import requests_at_once
from teacher_cache.storage.files.protocol import CacheFiles
from teacher_cache.storage.format.layout import Tower
from teacher_cache.storage.read.chunks import ChunkSource
from teacher_cache.storage.read.prefetch import ReadAhead
from teacher_cache.storage.read.rows import RowPlaces
from teacher_cache.storage.read.stream_chunks import StreamChunks, open_chunks

READ_AHEAD_BYTES = 64 << 20
"""Default budget of prefetched chunks. A store has twice as much, half of it in flight."""

Batch = NDArray[np.int64] | tuple[NDArray[np.int64], NDArray[np.int64]]
"""Rows, or rows and one view for each."""

Prove = Literal["first", "every"]

_GROUP_ROWS = 8192  # all chunks of a group of batches are in memory before its first batch
_CHECKED_ROWS = 32_768  # per check: each call into numpy may wait for the GIL
_ROWS_IN_SIGHT = 131_072  # maximum, plus one group
_LOCAL_THREADS = 2


def loads_at_once(files: CacheFiles, ahead: int) -> int:
    """Return the number of threads that load chunks: a few for a folder, one for each request to a store.

    Args:
        ahead: Chunks that may be requested from a store at once.
    """
    return max(_LOCAL_THREADS, min(requests_at_once(files), ahead))


class _Group(NamedTuple):
    """Consecutive batches.

    Attributes:
        batches: Rows of each batch, counted over the rows of all chunks, padding included.
        rows: Number of rows of all batches.
        numbers: Chunks that the batches need.
    """

    batches: list[NDArray[np.int64]]
    rows: int
    numbers: list[int]


def stream_rows(
    source: ChunkSource,
    tower: Tower,
    batches: Iterable[Batch],
    array: str = "embedding",
    prove: Prove = "first",
    read_ahead_bytes: int | None = None,
    threads: int | None = None,
) -> Iterator[NDArray[Any]]:
    """See :meth:`teacher_cache.storage.read.reader.EmbeddingReader.stream`."""
    if prove not in ("first", "every"):
        raise ValueError(f"prove is {prove!r}, choose 'first' or 'every'")
    if read_ahead_bytes is None:
        read_ahead_bytes = READ_AHEAD_BYTES * (2 if requests_at_once(source.files) > 1 else 1)
    if read_ahead_bytes < 0 or (threads is not None and threads < 1):
        raise ValueError(f"read_ahead_bytes={read_ahead_bytes}, threads={threads}: at least 0 and 1 are wanted")
    source.require_array(tower, array)
    chunks = open_chunks(source, tower, array, prove == "every")
    most_ahead = read_ahead_bytes // chunks.nbytes
    # half: answers come in any order, and chunks that wait behind a late one need memory too
    threads = threads or loads_at_once(source.files, most_ahead // 2)
    sight = _Sight(chunks, _groups(source, chunks, tower, batches), read_ahead_bytes)
    with chunks, ReadAhead(chunks.load, chunks.release, threads) as ahead:
        while (group := sight.first()) is not None:
            if len(group.numbers) > chunks.most_at_once:
                yield from _taken(source, chunks, tower, group)
            else:
                _load(chunks, ahead, group, sight.later(), most_ahead)
                yield from map(chunks.gather, group.batches)
            sight.drop_first()
            ahead.drop(keep=sight.numbers())


class _Sight:
    """Groups of batches that were read ahead and not yielded yet, within a maximum number of rows."""

    def __init__(self, chunks: StreamChunks, groups: Iterator[_Group], read_ahead_bytes: int) -> None:
        row_bytes = max(1, chunks.nbytes // chunks.places.chunk_rows)
        self._most_rows = min(_ROWS_IN_SIGHT, (read_ahead_bytes + chunks.nbytes) // row_bytes)
        self._chunks, self._coming = chunks, groups
        self._groups: deque[_Group] = deque()
        self._rows = 0

    def first(self) -> _Group | None:
        """Read groups ahead up to the maximum, and return the first one; None at the end."""
        while not self._groups or self._rows < self._most_rows:
            group = next(self._coming, None)
            if group is None:
                break
            self._groups.append(group)
            self._chunks.expect(group.numbers)
            self._rows += group.rows
        return self._groups[0] if self._groups else None

    def later(self) -> Iterator[_Group]:
        """Yield the groups behind the first one."""
        return islice(self._groups, 1, None)

    def drop_first(self) -> None:
        """Drop the first group."""
        self._rows -= self._groups.popleft().rows

    def numbers(self) -> set[int]:
        """Return the chunks that the groups need."""
        return {number for group in self._groups for number in group.numbers}


def _load(
    chunks: StreamChunks, ahead: ReadAhead[int, None], group: _Group, later: Iterator[_Group], most_ahead: int
) -> None:
    """Load the chunks of a group, and request chunks of later groups within the budget."""
    needed = chunks.to_load(group.numbers)
    ahead.ask(needed)
    room = max(0, most_ahead - ahead.beside(needed))
    for coming in later:
        more = [number for number in chunks.to_load(coming.numbers) if number not in ahead]
        ahead.ask(more[:room])
        room -= len(more)
        if room <= 0:
            break
    for number in needed:
        ahead.get(number)
    for number in chunks.unreadable(group.numbers):
        ahead.get(number)


def _taken(source: ChunkSource, chunks: StreamChunks, tower: Tower, group: _Group) -> Iterator[NDArray[Any]]:
    """Yield the batches of a group whose chunks do not fit in memory together: read chunk after chunk."""
    for at in group.batches:
        yield source.take_places(tower, at, chunks.array)


def _groups(source: ChunkSource, chunks: StreamChunks, tower: Tower, batches: Iterable[Batch]) -> Iterator[_Group]:
    """Yield the batches in groups. Rows, views and quarantine are checked here, for many batches at once."""
    places = chunks.places
    quarantined = {places.number(ref) for ref in source.quarantined_chunks(tower)}
    for part in _parts(batches):
        rows, views, lengths = _joined(places, part)
        at = places.at(rows, views)
        chunk = at // places.chunk_rows
        if quarantined and not quarantined.isdisjoint(places.distinct(chunk)):
            source.require_encoded(tower, rows, views, chunks.array)
        yield from _cut(places, at, chunk, lengths)


def _joined(places: RowPlaces, batches: list[Batch]) -> tuple[NDArray[np.int64], NDArray[np.int64], list[int]]:
    """Check the rows of several batches; return rows, views, and the number of rows of each batch."""
    if any(isinstance(batch, tuple) for batch in batches):
        pairs = [places.check(*batch) if isinstance(batch, tuple) else places.check(batch) for batch in batches]
        views = np.concatenate([np.broadcast_to(views, rows.shape) for rows, views in pairs])
        return np.concatenate([rows for rows, _ in pairs]), views, [len(rows) for rows, _ in pairs]
    arrays = [np.asarray(batch, np.int64) for batch in batches]
    rows, views = places.check(np.concatenate(arrays))
    return rows, views, [len(batch) for batch in arrays]


def _cut(places: RowPlaces, at: NDArray[np.int64], chunk: NDArray[np.int64], lengths: list[int]) -> Iterator[_Group]:
    """Yield groups of batches that have ``_GROUP_ROWS`` rows together."""
    batches: list[NDArray[np.int64]] = []
    first = start = 0
    for last, length in enumerate(lengths, 1):
        stop = start + length
        batches.append(at[start:stop])
        start = stop
        if stop - first >= _GROUP_ROWS or last == len(lengths):
            yield _Group(batches, stop - first, places.distinct(chunk[first:stop]))
            batches, first = [], stop


def _parts(batches: Iterable[Batch]) -> Iterator[list[Batch]]:
    """Yield lists of batches that have ``_CHECKED_ROWS`` rows together."""
    part: list[Batch] = []
    rows = 0
    for batch in batches:
        part.append(batch)
        rows += len(batch[0] if isinstance(batch, tuple) else batch)
        if rows >= _CHECKED_ROWS:
            yield part
            part, rows = [], 0
    if part:
        yield part
