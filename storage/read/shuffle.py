"""The order of training rows: a pure function of (rows, seed, epoch), so that a run can resume at any step.

Window shuffle: chunks are in random order, and rows are shuffled within a window of ``window_chunks`` chunks. So whole
chunks are read one after another, and a batch mixes rows of several chunks.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from teacher_cache.storage.read.chunk_cache import ByChunk
from teacher_cache.storage.read.rows import RowSet


def epoch_rng(seed: int, epoch: int, stream: int) -> np.random.Generator:
    """Return a counter-based generator for (seed, epoch, stream); two of them never share numbers."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, epoch, stream])))


def window_order(
    rows: NDArray[np.int64] | RowSet, chunk_rows: int, window_chunks: int, seed: int, epoch: int
) -> Iterator[NDArray[np.int64]]:
    """Yield the rows of one epoch, each once: an array for each window.

    Args:
        rows: Rows of the cache that take part (a split, without quarantined rows).
        chunk_rows: Rows per chunk of the cache.
        window_chunks: Chunks that are shuffled together; the number of all chunks gives a uniform shuffle.
        seed: Seed of the run.
        epoch: Number of the epoch.
    """
    rows = RowSet.of(rows)
    firsts = rows.chunks(chunk_rows) * chunk_rows
    picked = epoch_rng(seed, epoch, 0).permutation(firsts)
    for number, start in enumerate(range(0, len(firsts), window_chunks)):
        members = picked[start : start + window_chunks].tolist()
        window = np.concatenate([rows.numbers(first, first + chunk_rows) for first in members])
        yield epoch_rng(seed, epoch, number + 1).permutation(window)


def batches(windows: Iterator[NDArray[np.int64]], batch_size: int) -> Iterator[NDArray[np.int64]]:
    """Cut windows into full batches; the rest of a window joins the next one.

    The last rows of an epoch, fewer than ``batch_size``, are dropped: contrastive losses need the same number of
    negatives in every batch. Another epoch drops other rows.
    """
    rest = np.empty(0, np.int64)
    for window in windows:
        rest = np.concatenate([rest, window]) if len(rest) else window
        full = len(rest) - len(rest) % batch_size
        for start in range(0, full, batch_size):
            yield rest[start : start + batch_size]
        rest = rest[full:]


class RowDraws:
    """A uniform number in [0, 1) for each row of a cache: the numbers of one draw by :func:`epoch_rng` for all rows.

    Computed chunk by chunk when rows are used, since the numbers of all rows would take 8 bytes each.

    Args:
        seed, epoch, stream: As for :func:`epoch_rng`.
        chunk_rows: Rows of a chunk.
        kept: Number of chunks whose numbers stay for the next call.
    """

    def __init__(self, seed: int, epoch: int, stream: int, chunk_rows: int, kept: int) -> None:
        self._key = seed, epoch, stream
        self._chunk_rows = chunk_rows
        self._numbers = ByChunk(chunk_rows, kept, self._made)

    def of(self, rows: NDArray[np.int64]) -> NDArray[np.float64]:
        """Return the numbers of some rows, (len(rows),) float64."""
        out = np.empty(len(rows))
        for first, numbers, positions in self._numbers.of(rows):
            out[positions] = numbers[rows[positions] - first]
        return out

    def _made(self, chunk: int) -> NDArray[np.float64]:
        first = chunk * self._chunk_rows
        generator = epoch_rng(*self._key)
        # Philox counts in fours
        generator.bit_generator.advance(first // 4)  # type: ignore[attr-defined]
        generator.random(first % 4)
        return generator.random(self._chunk_rows)
