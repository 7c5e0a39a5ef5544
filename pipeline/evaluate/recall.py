"""Recall at K, exact; retention. Pure functions of arrays; no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from teacher_cache.pipeline.evaluate.faiss_search import nearest_parts, searches_on_gpu, top_k
from teacher_cache.storage.look.nearest import unit_rows
from teacher_cache.storage.look.ranks import first_positive_ranks as rows_before

__all__ = [
    "RECALL_KS",
    "RetrievalRanks",
    "first_positive_ranks",
    "mean_recall",
    "recall_of_ranks",
    "retention",
    "retrieval_recall",
    "top_k",
]

RECALL_KS = (1, 5, 10)


@dataclass(frozen=True)
class RetrievalRanks:
    """Where each query found the first of its positives: 1 for the best place, 0 for none down to ``depth``.

    Attributes:
        i2t: (images,) int32; any caption of the image is a positive. An image without captions has none: 0.
        t2i: (captions,) int32; the caption's image is the positive.
        depth: how many places were looked at; all of a smaller gallery.
    """

    i2t: NDArray[np.int32]
    t2i: NDArray[np.int32]
    depth: int


def first_positive_ranks(
    image: NDArray[Any], text: NDArray[Any], text_image: NDArray[np.int64], depth: int, cosine: bool = False
) -> RetrievalRanks:
    """Rank of the best positive of each image and of each caption, by inner product, equal scores by row number.

    Exact and in bounded memory, never all scores: counted (``teacher_cache.storage.look.ranks``), or searched for
    (``teacher_cache.pipeline.evaluate.faiss_search``) where faiss-gpu finds a GPU. Both ways give the same ranks.

    Args:
        image: (images, dim) of any float type, normalised.
        text: (captions, dim) likewise.
        text_image: (captions,) position of each caption's image in ``image``.
        depth: places to look at, at least 1; may exceed the gallery.
        cosine: the rows need not be of unit norm; made so some at a time
        (``teacher_cache.storage.look.nearest.unit_rows``).

    Raises:
        ValueError: no images or no captions, a position outside, depth below 1, other widths, or a value that is not
            finite.
    """
    if not len(image) or not len(text):
        raise ValueError(f"recall of {len(image)} images and {len(text)} captions is not defined")
    if text_image.shape != (len(text),) or text_image.min() < 0 or text_image.max() >= len(image):
        raise ValueError(f"text_image must give each of {len(text)} captions a position in 0 ... {len(image) - 1}")
    if depth < 1:
        raise ValueError(f"depth is {depth}, at least 1 wanted")
    if not searches_on_gpu():
        i2t, t2i = rows_before(image, text, text_image, depth, cosine)
        return RetrievalRanks(_from_one(i2t, depth), _from_one(t2i, depth), depth)
    image, text = (unit_rows(rows) if cosine else np.asarray(rows, np.float32) for rows in (image, text))
    images = np.arange(len(image))
    return RetrievalRanks(
        i2t=_first_positive(image, text, images, text_image, depth),
        t2i=_first_positive(text, image, text_image, images, depth),
        depth=depth,
    )


def _from_one(before: NDArray[np.int64], depth: int) -> NDArray[np.int32]:
    return np.where(before < depth, before + 1, 0).astype(np.int32)


def _first_positive(
    queries: NDArray[np.float32],
    gallery: NDArray[np.float32],
    query_group: NDArray[np.int64],
    gallery_group: NDArray[np.int64],
    depth: int,
) -> NDArray[np.int32]:
    ranks = np.zeros(len(queries), np.int32)
    for start, rows in nearest_parts(queries, gallery, depth):
        here = slice(start, start + len(rows))
        hits = gallery_group[rows] == query_group[here, None]
        ranks[here] = np.where(hits.any(axis=1), hits.argmax(axis=1) + 1, 0)
    return ranks


def recall_of_ranks(ranks: RetrievalRanks, ks: Sequence[int] = RECALL_KS) -> dict[str, dict[str, float]]:
    """Share of queries, in percent, with a positive among the first K.

    Args:
        ks: cut-offs, none beyond ``ranks.depth``; one beyond the gallery counts the whole gallery.

    Returns:
        ``{"i2t": {"R@1", ...}, "t2i": {...}}``. An image without captions counts as one that found nothing.

    Raises:
        ValueError: a cut-off below 1, or beyond what was looked at.
    """
    if min(ks) < 1 or max(ks) > ranks.depth:
        raise ValueError(f"cut-offs {tuple(ks)}: ranks were looked for down to {ranks.depth}")
    return {
        direction: {f"R@{k}": 100 * int(((found > 0) & (found <= k)).sum()) / len(found) for k in ks}
        for direction, found in (("i2t", ranks.i2t), ("t2i", ranks.t2i))
    }


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

    Raises:
        ValueError: as :func:`first_positive_ranks`.
    """
    return recall_of_ranks(first_positive_ranks(image, text, text_image, max(ks)), ks)


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
