"""Nearest rows by inner product, exact and in bounded memory, with numpy alone; for looking at a cache.

Blocks of float32 scores propose; whatever lies within float32's rounding error of a tie is decided by float64 scores
and then by the lower row.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "exact_scores",
    "near_pairs",
    "nearest",
    "paired_scores",
    "unit_rows",
]

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
    # einsum adds in one order, where BLAS adds in others at the edges of its blocks
    return np.asarray(np.einsum("pd,pd->p", left.astype(np.float64), right.astype(np.float64)))


def exact_scores(queries: _Floats, gallery: _Floats, query: _Rows, row: _Rows) -> NDArray[np.float64]:
    """:func:`paired_scores` of some queries and rows, in blocks.

    Args:
        queries, gallery: (n, dim) and (m, dim).
        query, row: (p,) and (p,): which of either.
    """
    out = np.empty(len(query))
    step = max(1, _BLOCK_BYTES // (16 * queries.shape[1]))
    for start in range(0, len(query), step):
        part = slice(start, start + step)
        out[part] = paired_scores(queries[query[part]], gallery[row[part]])
    return out


def nearest(queries: _Floats, blocks: Iterable[tuple[_Rows, _Floats]], k: int) -> tuple[_Rows, NDArray[np.float64]]:
    """Find the k nearest rows of a gallery that comes in blocks: best first, equal scores by row number.

    Holds at most max(8 k, 4,096) rows per query and a block, however many are tied.

    Args:
        queries: (n, dim).
        blocks: row numbers (m,) and rows (m, dim), each row once, in any order; read once.
        k: may exceed the gallery.

    Returns:
        (n, min(k, all rows)) row numbers, and their scores in float64.
    """
    rows = [np.empty(0, np.int64) for _ in queries]
    kept = [np.empty((0, queries.shape[1]), np.float32) for _ in queries]
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
            kept[at] = np.concatenate([kept[at][held], block[new]])
            rough[at] = np.concatenate([rough[at][held], row_scores[new]])
            if len(rows[at]) > max(8 * k, _KEPT_ROWS):  # near-ties, of a collapsed teacher say
                order, _ = _best(queries, at, rows[at], kept[at], k)
                rows[at], kept[at], rough[at] = rows[at][order], kept[at][order], rough[at][order]
    found = np.empty((len(queries), min(k, total)), np.int64)
    best = np.empty(found.shape)
    for at in range(len(queries)):
        order, best[at] = _best(queries, at, rows[at], kept[at], k)
        found[at] = rows[at][order]
    return found, best


def _best(queries: _Floats, at: int, rows: _Rows, kept: _Floats, k: int) -> tuple[_Rows, NDArray[np.float64]]:
    """Return places of the best k of one query's rows, by float64 score and then row, and their scores."""
    exact = exact_scores(queries, kept, np.full(len(rows), at), np.arange(len(rows)))
    order = np.lexsort((rows, -exact))[:k]
    return order, exact[order]


def near_pairs(rows: _Floats, least: float, most: int) -> tuple[int, _Rows, _Rows, NDArray[np.float64]]:
    """Find pairs of different rows with a cosine of at least ``least``, each once.

    Args:
        rows: (n, dim) of unit norm.
        most: pairs that are returned; the nearest ones.

    Returns:
        How many pairs there are; (n,) the number of near rows of each row; (p, 2) the returned pairs, nearest first;
        (p,) their cosines.
    """
    partners = np.zeros(len(rows), np.int64)
    found = np.empty((0, 2), np.int64)
    cosines = np.empty(0)
    pairs = 0
    step = max(1, _BLOCK_BYTES // (4 * max(len(rows), 1)))
    for start in range(0, len(rows), step):
        stop = min(start + step, len(rows))
        scores = rows[start:stop] @ rows[start:].T
        left, right = np.nonzero(scores >= least)
        keep = right > left
        left, right = left[keep] + start, right[keep] + start
        pairs += len(left)
        np.add.at(partners, left, 1)
        np.add.at(partners, right, 1)
        found = np.concatenate([found, np.stack([left, right], axis=1)])
        cosines = np.concatenate([cosines, np.minimum(scores[left - start, right - start], 1.0)])
        order = np.lexsort((found[:, 1], found[:, 0], -cosines))[:most]
        found, cosines = found[order], cosines[order]
    return pairs, partners, found, cosines
