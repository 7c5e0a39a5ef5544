"""The order of training rows: a pure function of (rows, seed, epoch), so that any run can go on where it was.

Window shuffle: chunks in random order, ``window_chunks`` of them in memory at a time, rows shuffled inside the
window. Reading stays sequential in whole chunks, and a batch mixes rows of several chunks.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

__all__ = ["RowDraws", "batches", "epoch_rng", "window_order"]


def epoch_rng(seed: int, epoch: int, stream: int) -> np.random.Generator:
    """A counter-based generator of its own for each (seed, epoch, stream); streams never share numbers."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, epoch, stream])))


def window_order(
    rows: NDArray[np.int64], chunk_rows: int, window_chunks: int, seed: int, epoch: int
) -> Iterator[NDArray[np.int64]]:
    """The rows of one epoch, each once, window by window.

    Args:
        rows: ascending row numbers of the cache that take part (a split, without quarantined rows).
        chunk_rows: rows per chunk of the cache.
        window_chunks: chunks shuffled together; at least the number of chunks gives a uniform shuffle.

    Yields:
        One array of rows per window; together a permutation of ``rows``.
    """
    # where chunks begin is looked up: a quotient for each row is more memory than the rows
    firsts = np.arange(rows[0] // chunk_rows, rows[-1] // chunk_rows + 2) * chunk_rows if len(rows) else rows
    edges = np.searchsorted(rows, firsts)
    groups = [rows[start:stop] for start, stop in itertools.pairwise(edges) if start < stop]
    picked = epoch_rng(seed, epoch, 0).permutation(len(groups))
    for number, start in enumerate(range(0, len(groups), window_chunks)):
        window = np.concatenate([groups[index] for index in picked[start : start + window_chunks]])
        yield epoch_rng(seed, epoch, number + 1).permutation(window)


def batches(windows: Iterator[NDArray[np.int64]], batch_size: int) -> Iterator[NDArray[np.int64]]:
    """Cut a stream of windows into full batches; the rest of a window joins the next one.

    The rows left over at the end of the epoch, fewer than ``batch_size``, are not yielded: contrastive terms
    need every batch to have the same number of negatives. Another epoch leaves out other rows.
    """
    rest = np.empty(0, np.int64)
    for window in windows:
        rest = np.concatenate([rest, window]) if len(rest) else window
        full = len(rest) - len(rest) % batch_size
        for start in range(0, full, batch_size):
            yield rest[start : start + batch_size]
        rest = rest[full:]


class RowDraws:
    """A uniform number in [0, 1) for each row of a cache: what :func:`epoch_rng` draws for all rows, at some of them.

    Made by chunks as rows are asked for, since those of all rows would be as large as their numbers.

    Args:
        chunk_rows: rows that come together.
        kept: chunks whose numbers stay for the next call.
    """

    def __init__(self, seed: int, epoch: int, stream: int, chunk_rows: int, kept: int) -> None:
        self._key = seed, epoch, stream
        self._chunk_rows, self._most = chunk_rows, kept
        self._kept: dict[int, NDArray[np.float64]] = {}

    def of(self, rows: NDArray[np.int64]) -> NDArray[np.float64]:
        """The numbers of some rows, (len(rows),) float64."""
        out = np.empty(len(rows))
        chunks = rows // self._chunk_rows
        by_chunk = np.argsort(chunks, kind="stable")
        used, starts = np.unique(chunks[by_chunk], return_index=True)
        for chunk, start, stop in zip(used.tolist(), starts, [*starts[1:], len(rows)], strict=False):
            at = by_chunk[start:stop]
            # last in, as the one that was used last
            numbers = self._kept.pop(chunk) if chunk in self._kept else self._made(chunk)
            self._kept[chunk] = numbers
            out[at] = numbers[rows[at] - chunk * self._chunk_rows]
        for chunk in list(self._kept)[: max(0, len(self._kept) - max(self._most, len(used)))]:
            del self._kept[chunk]
        return out

    def _made(self, chunk: int) -> NDArray[np.float64]:
        first = chunk * self._chunk_rows
        generator = epoch_rng(*self._key)
        # Philox counts in fours
        generator.bit_generator.advance(first // 4)  # type: ignore[attr-defined]
        generator.random(first % 4)
        return generator.random(self._chunk_rows)
