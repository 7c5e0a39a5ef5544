"""Exact recall at K, and retention. Pure functions of arrays; no torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from teacher_cache.pipeline.evaluate.faiss_search import Matches, find_engine, row_lengths, rows_ahead
from teacher_cache.storage.look.nearest import exact_scores

RECALL_KS = (1, 5, 10)
_ALL_PLACES = int(np.iinfo(np.int32).max)

Recalls = dict[str, dict[str, float]]


@dataclass(frozen=True)
class RetrievalRanks:
    """Rank of the first positive of each query, from 1; 0 if there is none down to ``depth``.

    Attributes:
        i2t: (images,) int32; every caption of the image is a positive. 0 for an image without captions.
        t2i: (captions,) int32; the caption's image is the positive.
        depth: greatest rank that was searched; a number above every gallery size if all were.
        engine: search library and its version.
    """

    i2t: NDArray[np.int32]
    t2i: NDArray[np.int32]
    depth: int
    engine: str = ""


def first_positive_ranks(
    image: NDArray[np.float32],
    text: NDArray[np.float32],
    text_image: NDArray[np.int64],
    depth: int | None = None,
    device: str = "auto",
) -> RetrievalRanks:
    """Rank the best positive of each image and of each caption by inner product, ties by row number.

    The ranks are exact: they equal those of all scores in float64. Memory is bounded.

    Args:
        image: (images, dim) float32, normalised.
        text: (captions, dim) float32, normalised.
        text_image: (captions,) position of each caption's image in ``image``.
        depth: greatest rank to search; may exceed the gallery. Default: all, which takes several times as long.
        device: auto, cpu, cuda or cuda:N, for FAISS.

    Raises:
        ValueError: there are no images or captions, a position is out of range, depth is below 1, the widths differ, or
            a value is not finite.
        UsageError: FAISS cannot use the device.
    """
    image, text = (np.ascontiguousarray(rows, np.float32) for rows in (image, text))
    _require_ranks(image, text, text_image, depth)
    engine = find_engine(device)
    depth = _ALL_PLACES if depth is None else depth
    score = exact_scores(text, image, np.arange(len(text)), text_image)
    best, first = best_captions(score, text_image, len(image))
    i2t = rows_ahead(Matches(image, best, first), text, depth, engine)
    t2i = rows_ahead(Matches(text, score, text_image), image, depth, engine)
    i2t[np.isinf(best)] = depth
    return RetrievalRanks(_from_one(i2t, depth), _from_one(t2i, depth), depth, engine.name)


def best_captions(
    score: NDArray[np.float64], text_image: NDArray[np.int64], images: int
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Return score and row of each image's best caption, the first of equal ones; score infinity without captions."""
    order = np.lexsort((-score, text_image))
    has_caption, start = np.unique(text_image[order], return_index=True)
    best, first = np.full(images, np.inf), np.zeros(images, np.int64)
    best[has_caption], first[has_caption] = score[order[start]], order[start]
    return best, first


def _from_one(ahead: NDArray[np.int64], depth: int) -> NDArray[np.int32]:
    return np.where(ahead < depth, ahead + 1, 0).astype(np.int32)


def _require_ranks(
    image: NDArray[np.float32], text: NDArray[np.float32], text_image: NDArray[np.int64], depth: int | None
) -> None:
    """Check the arguments of :func:`first_positive_ranks`."""
    if not len(image) or not len(text):
        raise ValueError(f"recall of {len(image)} images and {len(text)} captions is not defined")
    if image.ndim != 2 or text.ndim != 2 or image.shape[1] != text.shape[1]:
        raise ValueError(f"images {image.shape} and captions {text.shape} must both be (rows, dim) of one dim")
    if text_image.shape != (len(text),) or text_image.min() < 0 or text_image.max() >= len(image):
        raise ValueError(f"text_image must give each of {len(text)} captions a position in 0 ... {len(image) - 1}")
    if depth is not None and depth < 1:
        raise ValueError(f"depth is {depth}, at least 1 wanted")
    if not all(np.isfinite(row_lengths(rows)).all() for rows in (image, text)):
        raise ValueError("images and captions must be finite")


def recall_of_ranks(ranks: RetrievalRanks, ks: Sequence[int] = RECALL_KS) -> Recalls:
    """Return the share of queries, in percent, with a positive among the first K.

    Args:
        ks: cut-offs, none beyond ``ranks.depth``; one beyond the gallery counts the whole gallery.

    Returns:
        ``{"i2t": {"R@1", ...}, "t2i": {...}}``. An image without captions counts as a miss.

    Raises:
        ValueError: a cut-off is below 1 or beyond ``ranks.depth``.
    """
    if min(ks) < 1 or max(ks) > ranks.depth:
        raise ValueError(f"cut-offs {tuple(ks)}: ranks were looked for down to {ranks.depth}")
    return {
        direction: {f"R@{k}": 100 * int(((rank > 0) & (rank <= k)).sum()) / len(rank) for k in ks}
        for direction, rank in (("i2t", ranks.i2t), ("t2i", ranks.t2i))
    }


def retrieval_recall(
    image: NDArray[np.float32], text: NDArray[np.float32], text_image: NDArray[np.int64], ks: Sequence[int] = RECALL_KS
) -> Recalls:
    """Return image-to-text and text-to-image recall of one gallery, in percent.

    Args:
        image: (images, dim) normalised.
        text: (captions, dim) normalised.
        text_image: (captions,) position of each caption's image in ``image``.

    Returns:
        ``{"i2t": {"R@1", ...}, "t2i": {...}}``; for i2t any caption of the image is a hit.

    Raises:
        ValueError, UsageError: as :func:`first_positive_ranks`.
    """
    return recall_of_ranks(first_positive_ranks(image, text, text_image, max(ks)), ks)


def chance_recall(images: int, captions: int) -> Recalls:
    """Return the recalls in percent of a random order, for images that have equally many captions.

    An image's first K captions hold none of its own with the probability of the hypergeometric distribution.
    """
    own = captions / images
    return {
        "i2t": {
            f"R@{k}": 100 * (1 - math.prod(max(0.0, 1 - own / (captions - at)) for at in range(min(k, captions))))
            for k in RECALL_KS
        },
        "t2i": {f"R@{k}": 100 * min(1.0, k / images) for k in RECALL_KS},
    }


def mean_recall(recalls: Recalls) -> float:
    """Return the mean of all recalls of both directions, in percent."""
    return float(np.mean([value for side in recalls.values() for value in side.values()]))


def retention(student: Recalls, teacher: Recalls) -> dict[str, Any]:
    """Return the student's share of the teacher's recall, in percent, per metric and for the mean (``mean``).

    A share is None if the teacher's recall is 0.
    """

    def share(part: float, whole: float) -> float | None:
        return 100 * part / whole if whole else None

    ratios: dict[str, Any] = {
        direction: {name: share(student[direction][name], value) for name, value in recalls.items()}
        for direction, recalls in teacher.items()
    }
    ratios["mean"] = share(mean_recall(student), mean_recall(teacher))
    return ratios
