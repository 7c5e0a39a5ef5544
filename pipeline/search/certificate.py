"""Loss of an index against exact search in one direction: R@10 on the same queries, and a bound on the loss."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from teacher_cache.pipeline.evaluate.faiss_search import Matches, find_engine, rows_ahead
from teacher_cache.pipeline.evaluate.recall import best_captions
from teacher_cache.pipeline.search.approximate import ApproximateIndex
from teacher_cache.pipeline.search.record import LEVEL, MEASURED_K
from teacher_cache.storage.errors import UsageError
from teacher_cache.storage.look.nearest import exact_scores

MOST_QUERIES = 4_096

_Floats = NDArray[np.float32]
_Rows = NDArray[np.int64]
_Flags = NDArray[np.bool_]


class Certificate(NamedTuple):
    """Measured loss of an index, with the fields of ``record.IndexedTower``."""

    effort: int | None
    queries: int
    sampled: bool
    exact: float
    found: float
    lost_at_most: float
    products: float


@dataclass(frozen=True)
class Direction:
    """Queries of one direction and the gallery that answers them.

    A query is answered if one of its own rows is among the first ten: as in ``pipeline.evaluate.recall``.

    Attributes:
        name: image to text, or text to image.
        gallery: (rows, dim) float32, unit norm.
        gallery_image: (rows,) number of the image that each row shows or describes, ascending.
        queries: (queries, dim) float32, unit norm.
        query_image: (queries,) number of the image of each query.
        sampled: True if the queries are drawn with replacement, False if they are all.
    """

    name: str
    gallery: _Floats
    gallery_image: _Rows
    queries: _Floats
    query_image: _Rows
    sampled: bool

    def answered_exactly(self) -> _Flags:
        """Return which queries exact search answers, (queries,)."""
        first, last = (np.searchsorted(self.gallery_image, self.query_image, side) for side in ("left", "right"))
        counts = last - first
        query = np.repeat(np.arange(len(counts)), counts)
        row = np.arange(len(query)) - np.repeat(np.cumsum(counts) - counts - first, counts)
        best, at = best_captions(exact_scores(self.queries, self.gallery, query, row), query, len(counts))
        matches = Matches(self.queries, best, row[at])
        return rows_ahead(matches, self.gallery, MEASURED_K, find_engine("cpu")) < MEASURED_K

    def answered_by(self, rows: _Rows) -> _Flags:
        """Return which queries these rows of the gallery answer, (queries,); -1 is no row."""
        return np.asarray(((self.gallery_image[rows] == self.query_image[:, None]) & (rows >= 0)).any(axis=1))


def draw_queries(count: int, seed: int) -> tuple[_Rows, bool]:
    """Return the numbers of the queries to measure: all, or 4,096 drawn with replacement, and whether they are drawn.

    With replacement they are independent, as the bound assumes.
    """
    if count <= MOST_QUERIES:
        return np.arange(count), False
    return np.random.default_rng(seed).integers(0, count, MOST_QUERIES), True


def certify(index: ApproximateIndex, direction: Direction, within: float) -> Certificate:
    """Raise the effort of an index until it loses at most ``within`` points of R@10, and leave it there.

    Raises:
        UsageError: no effort is enough; the message says what was reached.
    """
    exact = direction.answered_exactly()
    for attempt, effort in enumerate(index.efforts(), 1):
        if effort is not None:
            index.set_effort(effort)
        rows, products = index.counted(direction.queries, MEASURED_K)
        answered = direction.answered_by(rows)
        loss = 100 * float(exact.mean() - answered.mean())
        if direction.sampled:
            # of all attempts together at most 1 - LEVEL: 1/2 + 1/4 + ... of it
            loss = 100 * upper_bound(exact & ~answered, (1 - LEVEL) / 2**attempt)
        reached = Certificate(
            effort, len(exact), direction.sampled, 100 * exact.mean(), 100 * answered.mean(), loss, products
        )
        if loss <= within:
            return reached
    bound = f"at most {loss:.2f} points at {LEVEL:.0%} confidence" if direction.sampled else f"{loss:.2f} points"
    effort_words = f" with {index.effort} {reached.effort}" if index.effort else ""
    raise UsageError(
        f"{direction.name}: the index loses {bound} of R@{MEASURED_K}{effort_words}, more than --within {within:g}pt: "
        f"{reached.found:.2f} % of {reached.queries:,} queries, exact search {reached.exact:.2f} %. Allow more, or "
        "name another --factory. Nothing was written"
    )


def upper_bound(values: NDArray[np.generic], probability: float) -> float:
    """Return a bound that the mean of the distribution exceeds with at most this probability.

    Maurer and Pontil 2009, "Empirical Bernstein bounds and sample variance penalization", theorem 4:
    mean + sqrt(2 V ln(2/p) / n) + 7 ln(2/p) / (3 (n - 1)), with V the sample variance.

    Args:
        values: (n,) independent values in 0 ... 1, at least two.
    """
    numbers, log = values.astype(np.float64), math.log(2 / probability)
    spread = math.sqrt(2 * float(numbers.var(ddof=1)) * log / len(numbers))
    return float(numbers.mean()) + spread + 7 * log / (3 * (len(numbers) - 1))
