"""Nearest rows by inner product, exact and in bounded memory, with numpy alone; for looking at a cache.

Float32 scores select candidates, block by block. Candidates within float32's rounding error are ranked by float64
scores, then by row number.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

_BLOCK_BYTES = 64 << 20
_KEPT_ROWS = 4_096
_Floats = NDArray[np.float32]
_Rows = NDArray[np.int64]


def unit_rows(rows: NDArray[Any]) -> _Floats:
    """Return float32 rows of unit norm: float16 storage moved the norm by up to 2^-11."""
    unit: _Floats = rows.astype(np.float32)
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    return unit


def _margin(queries: _Floats, longest: float) -> NDArray[np.float64]:
    # a float32 sum of dim products is off by less than dim * 2^-24 * |q| |g| (Higham 2002, eq. 3.7), twice for a pair
    norms = np.linalg.norm(queries.astype(np.float64), axis=1)
    return np.asarray(2 * queries.shape[1] * 2.0**-24 * longest * norms)


def paired_scores(left: _Floats, right: _Floats) -> NDArray[np.float64]:
    """Return (p,) float64 inner products of rows side by side; equal vectors get equal scores.

    Args:
        left, right: (p, dim) each.
    """
    # einsum adds in one order; BLAS uses another order at the edges of its blocks
    return np.asarray(np.einsum("pd,pd->p", left.astype(np.float64), right.astype(np.float64)))


def exact_scores(queries: _Floats, gallery: _Floats, query: _Rows, row: _Rows) -> NDArray[np.float64]:
    """Return :func:`paired_scores` of selected queries and rows, computed in blocks.

    Args:
        queries, gallery: (n, dim) and (m, dim).
        query, row: (p,) indices into ``queries`` and into ``gallery``.
    """
    out = np.empty(len(query))
    step = max(1, _BLOCK_BYTES // (16 * queries.shape[1]))
    for start in range(0, len(query), step):
        part = slice(start, start + step)
        out[part] = paired_scores(queries[query[part]], gallery[row[part]])
    return out


def nearest(queries: _Floats, blocks: Iterable[tuple[_Rows, _Floats]], k: int) -> tuple[_Rows, NDArray[np.float64]]:
    """Find the k nearest rows of a gallery that comes in blocks: best first, equal scores by row number.

    Holds at most max(8 k, 4,096) rows per query and one block, even with many ties.

    Args:
        queries: (n, dim).
        blocks: row numbers (m,) and rows (m, dim), each row once, in any order; read once.
        k: may exceed the gallery.

    Returns:
        (n, min(k, all rows)) row numbers, and their scores in float64.
    """
    rows = [np.empty(0, np.int64) for _ in queries]
    vectors = [np.empty((0, queries.shape[1]), np.float32) for _ in queries]
    rough = [np.empty(0, np.float32) for _ in queries]
    total, longest = 0, 0.0
    for numbers, block in blocks:
        total += len(numbers)
        longest = max(longest, float(np.linalg.norm(block.astype(np.float64), axis=1).max(initial=0.0)))
        margin = _margin(queries, longest)
        scores = queries @ block.T
        for at, row_scores in enumerate(scores):
            all_scores = np.concatenate([rough[at], row_scores])
            least = np.partition(all_scores, -k)[-k] if len(all_scores) > k else -np.inf
            held, new = rough[at] >= least - margin[at], row_scores >= least - margin[at]
            rows[at] = np.concatenate([rows[at][held], numbers[new]])
            vectors[at] = np.concatenate([vectors[at][held], block[new]])
            rough[at] = np.concatenate([rough[at][held], row_scores[new]])
            if len(rows[at]) > max(8 * k, _KEPT_ROWS):  # many near-ties, as from a collapsed teacher
                order, _ = _best(queries, at, rows[at], vectors[at], k)
                rows[at], vectors[at], rough[at] = rows[at][order], vectors[at][order], rough[at][order]
    best_rows = np.empty((len(queries), min(k, total)), np.int64)
    best_scores = np.empty(best_rows.shape)
    for at in range(len(queries)):
        order, best_scores[at] = _best(queries, at, rows[at], vectors[at], k)
        best_rows[at] = rows[at][order]
    return best_rows, best_scores


def _best(queries: _Floats, at: int, rows: _Rows, vectors: _Floats, k: int) -> tuple[_Rows, NDArray[np.float64]]:
    """Return the positions of the best k rows of one query, by float64 score and then row, and their scores."""
    exact = exact_scores(queries, vectors, np.full(len(rows), at), np.arange(len(rows)))
    order = np.lexsort((rows, -exact))[:k]
    return order, exact[order]


def near_pairs(rows: _Floats, least: float, most: int) -> tuple[int, _Rows, _Rows, NDArray[np.float64]]:
    """Find pairs of different rows with a cosine of at least ``least``, each once.

    Args:
        rows: (n, dim) of unit norm.
        most: maximum number of pairs returned, the nearest ones.

    Returns:
        Number of all pairs; (n,) number of near rows of each row; (p, 2) returned pairs, nearest first; (p,) their
        cosines.
    """
    partners = np.zeros(len(rows), np.int64)
    nearest_pairs = np.empty((0, 2), np.int64)
    cosines = np.empty(0)
    pairs = 0
    step = max(1, _BLOCK_BYTES // (4 * max(len(rows), 1)))
    for start in range(0, len(rows), step):
        stop = min(start + step, len(rows))
        scores = rows[start:stop] @ rows[start:].T
        first, second = np.nonzero(scores >= least)
        keep = second > first
        first, second = first[keep] + start, second[keep] + start
        pairs += len(first)
        np.add.at(partners, first, 1)
        np.add.at(partners, second, 1)
        nearest_pairs = np.concatenate([nearest_pairs, np.stack([first, second], axis=1)])
        cosines = np.concatenate([cosines, np.minimum(scores[first - start, second - start], 1.0)])
        order = np.lexsort((nearest_pairs[:, 1], nearest_pairs[:, 0], -cosines))[:most]
        nearest_pairs, cosines = nearest_pairs[order], cosines[order]
    return pairs, partners, nearest_pairs, cosines
