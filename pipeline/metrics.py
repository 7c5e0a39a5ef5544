"""Recall at K, exact with FAISS; accuracy of classification; retention. Pure functions of arrays; no torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["classification_accuracy", "mean_recall", "recall_at_k", "retention", "retrieval_recall", "top_k"]

RECALL_KS = (1, 5, 10)

_QUERIES_AT_ONCE = 4096
_RESCORE_BYTES = 256 << 20


def top_k(queries: NDArray[np.float32], gallery: NDArray[np.float32], k: int) -> NDArray[np.int64]:
    """The k nearest rows of the gallery by inner product, best first, equal scores by row number.

    Exact: FAISS (``IndexFlatIP``, float32) proposes, and every query whose order is within float32's rounding error
    of a tie is decided anew by scores in float64, over as many candidates as it takes to be sure.

    Args:
        queries: (n, dim) float32.
        gallery: (m, dim) float32.
        k: may exceed m.

    Returns:
        (n, min(k, m)) row numbers.

    Raises:
        ValueError: widths differ, or a value is not finite.
    """
    import faiss

    if queries.ndim != 2 or gallery.ndim != 2 or queries.shape[1] != gallery.shape[1]:
        raise ValueError(f"queries {queries.shape} and gallery {gallery.shape} must both be (rows, dim) of one dim")
    if not (np.isfinite(queries).all() and np.isfinite(gallery).all()):
        raise ValueError("queries and gallery must be finite")
    k = min(k, len(gallery))
    found = np.empty((len(queries), k), np.int64)
    if not k or not len(queries):
        return found
    index = faiss.IndexFlatIP(gallery.shape[1])
    index.add(np.ascontiguousarray(gallery, np.float32))
    longest = float(np.linalg.norm(gallery.astype(np.float64), axis=1).max())
    for start in range(0, len(queries), _QUERIES_AT_ONCE):
        part = np.ascontiguousarray(queries[start : start + _QUERIES_AT_ONCE], np.float32)
        found[start : start + len(part)] = _exact(index, part, gallery, k, longest)
    return found


def _exact(
    index: Any, queries: NDArray[np.float32], gallery: NDArray[np.float32], k: int, longest: float
) -> NDArray[np.int64]:
    dim = gallery.shape[1]
    # a float32 sum of dim products is off by less than dim * 2^-24 * |q| |g| (Higham 2002, eq. 3.7), twice for a pair
    margin = 2 * dim * 2.0**-24 * np.linalg.norm(queries.astype(np.float64), axis=1) * longest
    asked = min(k + 1, len(gallery))
    scores, rows = index.search(queries, asked)
    result: NDArray[np.int64] = rows[:, :k].copy()
    close = (scores[:, :-1] - scores[:, 1:] <= margin[:, None]).any(axis=1)
    open_queries = np.flatnonzero(close)
    while len(open_queries):
        asked = min(max(2 * asked, k + 32), len(gallery))
        scores, rows = index.search(queries[open_queries], asked)
        order, exact = _rescore(queries[open_queries], gallery, rows, k)
        result[open_queries] = order
        # sure when nothing beyond the candidates can reach the k-th score, or there is nothing beyond
        sure = (scores[:, -1] + margin[open_queries] < exact) | (asked == len(gallery))
        open_queries = open_queries[~sure]
    return result


def _rescore(
    queries: NDArray[np.float32], gallery: NDArray[np.float32], rows: NDArray[np.int64], k: int
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """The best k of the candidates by float64 score, then row; and the k-th score."""
    best = np.empty((len(queries), k), np.int64)
    kth = np.empty(len(queries))
    step = max(1, _RESCORE_BYTES // (rows.shape[1] * gallery.shape[1] * 8))
    for start in range(0, len(queries), step):
        part, candidates = queries[start : start + step], rows[start : start + step]
        # einsum adds in one order whatever the rows are, so that equal vectors get equal scores
        scores = np.einsum("nd,ncd->nc", part.astype(np.float64), gallery[candidates].astype(np.float64))
        order = np.lexsort((candidates, -scores), axis=1)[:, :k]
        best[start : start + step] = np.take_along_axis(candidates, order, axis=1)
        kth[start : start + step] = np.take_along_axis(scores, order[:, -1:], axis=1)[:, 0]
    return best, kth


def recall_at_k(
    found: NDArray[np.int64], query_group: NDArray[np.int64], gallery_group: NDArray[np.int64], ks: Sequence[int]
) -> dict[str, float]:
    """Share of queries, in percent, with a positive among the first K found.

    Args:
        found: (queries, K) gallery rows, best first.
        query_group: (queries,) which image a query belongs to.
        gallery_group: (gallery,) which image a gallery row belongs to; any row of the same image is a positive.
        ks: cut-offs; one beyond the gallery counts the whole gallery.

    Returns:
        ``{"R@1": ..., ...}`` in percent.

    Raises:
        ValueError: no queries.
    """
    if not len(found):
        raise ValueError("recall of no queries is not defined")
    hits = gallery_group[found] == query_group[:, None]
    return {f"R@{k}": 100 * int(hits[:, :k].any(axis=1).sum()) / len(hits) for k in ks}


def retrieval_recall(
    image: NDArray[np.float32], text: NDArray[np.float32], text_image: NDArray[np.int64], ks: Sequence[int] = RECALL_KS
) -> dict[str, dict[str, float]]:
    """Image-to-text and text-to-image recall of one gallery.

    Args:
        image: (images, dim) normalised.
        text: (captions, dim) normalised.
        text_image: (captions,) position of each caption's image in ``image``.

    Returns:
        ``{"i2t": {"R@1", ...}, "t2i": {...}}`` in percent; i2t counts any caption of the image as found.
    """
    images = np.arange(len(image))
    most = max(ks)
    return {
        "i2t": recall_at_k(top_k(image, text, most), images, text_image, ks),
        "t2i": recall_at_k(top_k(text, image, most), text_image, images, ks),
    }


def mean_recall(recalls: dict[str, dict[str, float]]) -> float:
    """Mean of all recalls of both directions, in percent: one number for a whole table."""
    return float(np.mean([value for side in recalls.values() for value in side.values()]))


def retention(student: dict[str, dict[str, float]], teacher: dict[str, dict[str, float]]) -> dict[str, Any]:
    """Student as a share of teacher, in percent, per metric and of the mean recall (``mean``).

    None where the teacher's own recall is 0.
    """

    def share(part: float, whole: float) -> float | None:
        return 100 * part / whole if whole else None

    ratios: dict[str, Any] = {
        direction: {name: share(student[direction][name], value) for name, value in recalls.items()}
        for direction, recalls in teacher.items()
    }
    ratios["mean"] = share(mean_recall(student), mean_recall(teacher))
    return ratios


def classification_accuracy(scores: NDArray[Any], labels: NDArray[np.int64]) -> dict[str, float]:
    """Accuracies in percent: ``top-1``, ``top-5`` and ``mean per class``, the mean over classes of their top-1.

    Args:
        scores: (images, classes); the higher, the better. Equal scores are ranked by class number.
        labels: (images,) the true class of each.

    Raises:
        ValueError: no images, scores that are not finite, or a label without a column.
    """
    if not len(scores) or len(scores) != len(labels):
        raise ValueError(f"{len(scores)} rows of scores and {len(labels)} labels; as many of both wanted, and some")
    if not np.isfinite(scores).all() or labels.min() < 0 or labels.max() >= scores.shape[1]:
        raise ValueError(f"scores must be finite and labels in 0 ... {scores.shape[1] - 1}")
    order = np.argsort(-scores, axis=1, kind="stable")
    hits = order == labels[:, None]
    first = hits[:, 0]
    per_class = [first[labels == label].mean() for label in np.unique(labels)]
    return {
        "top-1": 100 * float(first.mean()),
        "top-5": 100 * float(hits[:, :5].any(axis=1).mean()),
        "mean per class": 100 * float(np.mean(per_class)),
    }
