"""Samples of a cache's rows: all rows of a small cache, rows of random chunks of a large one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from teacher_cache.storage.errors import UsageError
from teacher_cache.storage.format.commits import ChunkRef
from teacher_cache.storage.format.layout import Tower
from teacher_cache.storage.read.reader import EmbeddingReader

Progress = Callable[[str, int, int], None]
"""Called with (stage, done, total)."""

_CHUNKS_DRAWN = 64  # chunks are read whole: rows from all chunks would mean reading the whole cache


def stage(progress: Progress | None, name: str) -> Callable[[int, int], None]:
    """Return a function that reports (done, total) of one stage; without ``progress`` it does nothing."""
    return _ignore if progress is None else partial(progress, name)


def _ignore(done: int, total: int) -> None:
    pass


def require_view(reader: EmbeddingReader, view: int) -> None:
    """Check that a cache has a view of its images.

    Raises:
        UsageError: the cache has no such view.
    """
    if not 0 <= view < reader.views:
        raise UsageError(f"{reader.location}: no view {view}; views 0 to {reader.views - 1} can be read")


def draw_rows(rows: NDArray[np.int64], chunk_rows: int, most: int, seed: int) -> NDArray[np.int64]:
    """Draw at most ``most`` of the rows, ascending: equal parts of random chunks.

    Args:
        rows: ascending.
        chunk_rows: rows per chunk.
        seed: seed of the draw of chunks and of rows within them.
    """
    if len(rows) <= most:
        return rows
    random = np.random.default_rng(seed)
    chunks = np.split(rows, np.flatnonzero(np.diff(rows // chunk_rows)) + 1)
    share = -(-most // min(len(chunks), _CHUNKS_DRAWN))
    drawn: list[NDArray[np.int64]] = []
    missing = most
    for number in random.permutation(len(chunks)):
        part = random.choice(chunks[number], min(share, missing, len(chunks[number])), replace=False)
        drawn.append(part)
        missing -= len(part)
        if not missing:
            break
    return np.sort(np.concatenate(drawn))


def stored_rows(
    reader: EmbeddingReader,
    tower: Tower,
    rows: NDArray[np.int64],
    view: int = 0,
    array: str = "embedding",
    progress: Callable[[int, int], None] = _ignore,
) -> NDArray[Any]:
    """Read rows of one array, each chunk once; quarantined rows are NaN.

    Args:
        rows: (n,) in any order.
        progress: called with (chunks read, chunks in all).

    Raises:
        IndexError, CacheCorruptError, CacheAccessError, CacheUnreachableError: as ``EmbeddingReader.chunk``.
    """
    places = reader.parts.places(tower)
    at = places.at(rows, np.array(view))
    chunks = list(places.by_chunk(at))
    layout = reader.manifest.layout
    stored = np.empty((0, layout.embed_dim) if array == "embedding" else (0,), np.float32)
    for number, (ref, positions) in enumerate(chunks):
        values = reader.chunk(ref, array)[at[positions] % places.chunk_rows]
        if not number:
            stored = np.empty((len(rows), *values.shape[1:]), values.dtype)
        stored[positions] = values
        progress(number + 1, len(chunks))
    return stored


def row_blocks(
    reader: EmbeddingReader,
    tower: Tower,
    most: int | None = None,
    seed: int = 0,
    view: int = 0,
    progress: Callable[[int, int], None] = _ignore,
) -> Iterator[tuple[NDArray[np.int64], NDArray[Any]]]:
    """Yield row numbers and embeddings chunk by chunk, without the quarantined ones.

    Args:
        most: maximum number of rows; if there are more, random chunks are read. None reads every chunk.
        progress: called with (chunks read, chunks in all).
    """
    layout = reader.manifest.layout
    count = reader.parts.places(tower).chunks
    chunks = np.arange(count)
    if most is not None and layout.rows(tower) > most:
        drawn = max(1, most // layout.chunk_rows(tower))
        chunks = np.sort(np.random.default_rng(seed).permutation(count)[:drawn])
    for number, chunk in enumerate(chunks):
        ref = ChunkRef(tower, view if tower == "image" else 0, int(chunk))
        values = reader.chunk(ref)
        usable = ~np.isnan(values[:, 0])
        yield np.asarray(reader.parts.rows(ref), np.int64)[usable], values[usable]
        progress(number + 1, len(chunks))
