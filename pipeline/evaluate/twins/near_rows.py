"""Nearest rows of one set of images among another, exact and in bounded memory, with numpy alone.

Rows are shortened first. With an orthonormal basis P of k dimensions, and x', y' the parts of unit rows x and y outside
its span, ``x y = (xP)(yP) + x' y' <= (xP)(yP) + |x'| |y'|`` (Cauchy-Schwarz): the product of the rows ``(xP, |x'|)`` is
never below the cosine. It is computed for all pairs; the few that reach the minimum are computed in full.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from teacher_cache.storage.look.nearest import unit_rows
from teacher_cache.storage.read.reader import EmbeddingReader

_BLOCK_ROWS = 4_096
_SAMPLE_ROWS = 2_048
_SHORT_DIMS = (31, 63, 127, 255)
_MOST_PASSED = 1e-4  # of all pairs: a pair in full costs as much as hundreds of shortened ones
_ROUNDING = 1e-5  # of float32 products
_PRUNED_PAIRS = 1 << 20

_Floats = NDArray[np.float32]
_Halves = NDArray[np.float16]
_Rows = NDArray[np.int64]


class NearRows(NamedTuple):
    """Pairs of near rows: (pairs,) position of the query, row of the gallery, and cosine."""

    query: _Rows
    row: _Rows
    cosine: _Floats

    @classmethod
    def joined(cls, parts: Sequence[NearRows]) -> NearRows:
        """Return the pairs of all parts, in order."""
        none = cls(np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.float32))
        return cls(*map(np.concatenate, zip(none, *parts, strict=True)))

    def nearest(self, most: int) -> NearRows:
        """Return at most ``most`` pairs of each query: sorted by query, its nearest rows first."""
        order = np.lexsort((self.row, -self.cosine, self.query))
        queries = self.query[order]
        order = order[np.arange(len(order)) - np.searchsorted(queries, queries) < most]
        return self.taken(order)

    def taken(self, which: slice | _Rows) -> NearRows:
        """Return some of the pairs, by position."""
        return NearRows(self.query[which], self.row[which], self.cosine[which])


def read_queries(reader: EmbeddingReader, rows: _Rows) -> _Halves:
    """Return the unit rows of images, view 0, as float16 (rows, dim): an error of a cosine of some 1e-4."""
    blocks = [part.astype(np.float16) for _, part in _blocks(reader, rows)]
    return np.concatenate(blocks) if blocks else np.empty((0, reader.embed_dim), np.float16)


def usual_cosine(queries: _Halves) -> float:
    """Return the mean cosine of two different rows; 0 for fewer than two."""
    count = len(queries)
    length = float(np.square(queries.sum(axis=0, dtype=np.float64)).sum())
    return (length - count) / (count * (count - 1)) if count > 1 else 0.0


def nearest_rows(
    queries: _Halves,
    gallery: EmbeddingReader,
    rows: _Rows,
    least: float,
    most: int,
    progress: Callable[[int, int], None] | None = None,
) -> NearRows:
    """Find for each query its nearest rows of a gallery, view 0, with a cosine of at least ``least``.

    The gallery is read once, in blocks. Memory holds the queries, with up to 256 more numbers for each, at most
    ``most`` pairs of each query, and one block.

    Args:
        queries: result of :func:`read_queries`.
        rows: rows of the gallery to search, ascending; each must have an embedding.
        most: maximum number of rows of each query, its nearest ones.
        progress: called with (rows of the gallery done, of all).
    """
    basis = _basis(queries, least)
    short = [_shortened(queries[at : at + _BLOCK_ROWS].astype(np.float32), basis) for at in _starts(queries)]
    best, new, done = NearRows.joined([]), list[NearRows](), 0
    for numbers, block in _blocks(gallery, rows):
        bounds = _shortened(block, basis)
        for start, short_queries in zip(_starts(queries), short, strict=True):
            part = queries[start : start + _BLOCK_ROWS]
            near = _near(part, short_queries, block, bounds, least).nearest(most)
            if len(near.query):
                new.append(NearRows(near.query + start, numbers[near.row], near.cosine))
        if sum(len(part.query) for part in new) > max(_PRUNED_PAIRS, len(best.query)):
            best, new = NearRows.joined([best, *new]).nearest(most), []
        done += len(numbers)
        if progress is not None:
            progress(done, len(rows))
    return NearRows.joined([best, *new]).nearest(most)


def _starts(rows: NDArray[np.generic]) -> range:
    return range(0, len(rows), _BLOCK_ROWS)


def _blocks(reader: EmbeddingReader, rows: _Rows) -> Iterator[tuple[_Rows, _Floats]]:
    for start in _starts(rows):
        numbers = rows[start : start + _BLOCK_ROWS]
        yield numbers, unit_rows(reader.take("image", numbers))


def _basis(queries: _Halves, least: float) -> _Floats:
    """Return the fewest principal directions that few pairs of a sample pass; all of them if none are that few."""
    some = queries[:: -(-len(queries) // _SAMPLE_ROWS) or 1].astype(np.float32)
    _, vectors = np.linalg.eigh(some.T @ some)
    principal: _Floats = np.ascontiguousarray(vectors[:, ::-1], np.float32)
    for dims in (dims for dims in _SHORT_DIMS if dims < len(principal)):
        short = _shortened(some, principal[:, :dims])
        passed = int((short @ short.T >= least).sum()) - len(some)  # but each row with itself
        if passed <= _MOST_PASSED * len(some) ** 2:
            return np.ascontiguousarray(principal[:, :dims])
    return principal


def _shortened(rows: _Floats, basis: _Floats) -> _Floats:
    inside = rows @ basis
    outside = np.sqrt(np.clip(1 - np.einsum("nd,nd->n", inside, inside), 0, None))
    return np.concatenate([inside, outside[:, None]], axis=1)


def _near(queries: _Halves, short: _Floats, rows: _Floats, bounds: _Floats, least: float) -> NearRows:
    """Return the pairs of some queries and some rows, both by position, that reach the minimum."""
    passed = np.flatnonzero(short @ bounds.T >= least - _ROUNDING)
    query, row = passed // len(rows), passed % len(rows)
    cosine = np.empty(len(passed), np.float32)
    for at in range(0, len(passed), 16 * _BLOCK_ROWS):
        part = slice(at, at + 16 * _BLOCK_ROWS)
        cosine[part] = np.einsum("pd,pd->p", queries[query[part]].astype(np.float32), rows[row[part]])
    near = cosine >= least
    return NearRows(query[near], row[near], cosine[near])
