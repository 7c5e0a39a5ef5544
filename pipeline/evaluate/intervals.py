"""Bootstrap intervals of recall, accuracy and retention. No torch.

Images are drawn with replacement, each with all its captions, since captions of one image are hit or missed
together (cluster bootstrap; Field & Welsh 2007, "Bootstrapping clustered data"). The interval lies between percentiles
of the resamples' values (Efron & Tibshirani 1993, "An Introduction to the Bootstrap", ch. 13). Student and teacher are
measured on the same resamples, so that hard images in a resample cancel in their ratio.

An interval is the uncertainty from the choice of images. It does not include the variance between training seeds.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, Field

from teacher_cache.pipeline.evaluate.recall import RECALL_KS, RetrievalRanks

RESAMPLES = 2000
LEVEL = 0.95

_BLOCK_BYTES = 64 << 20


class Interval(BaseModel, frozen=True):
    """The bounds of an interval, in percent."""

    low: float
    high: float


class RecallIntervals(BaseModel, frozen=True):
    """An interval for each number of a recall table; None if the denominator of a resample is 0."""

    i2t: dict[str, Interval | None]
    t2i: dict[str, Interval | None]
    mean: Interval | None = Field(description="Interval of the mean of all recalls, or of its share.")


def resampled_sums(values: NDArray[Any], resamples: int = RESAMPLES, seed: int = 0) -> NDArray[np.float64]:
    """Sum each column over resamples of the images, drawn with replacement.

    The draws depend only on the number of images, ``resamples`` and ``seed``: teacher and student have the same.

    Args:
        values: (images, columns).

    Returns:
        (resamples, columns). Working memory: about 200 MB at any size.

    Raises:
        ValueError: no images or no resamples.
    """
    images = len(values)
    if not images or resamples < 1:
        raise ValueError(f"{images} images and {resamples} resamples; some of both wanted")
    wide = np.ascontiguousarray(values, np.float64)
    rng = np.random.default_rng(seed)
    sums = np.empty((resamples, wide.shape[1]))
    step = max(1, _BLOCK_BYTES // (8 * images))
    for start in range(0, resamples, step):
        part = sums[start : start + step]
        drawn = rng.integers(0, images, (len(part), images))
        drawn += images * np.arange(len(part))[:, None]
        # number of times that each image is in each resample
        counts = np.bincount(drawn.reshape(-1), minlength=len(part) * images).reshape(len(part), images)
        part[:] = counts.astype(np.float64) @ wide
    return sums


def bootstrap_recalls(
    ranks: RetrievalRanks,
    text_image: NDArray[np.int64],
    ks: Sequence[int] = RECALL_KS,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> RecallIntervals:
    """Return an interval for each recall of ``recall.recall_of_ranks``, and for their mean.

    Args:
        text_image: (captions,) position of each caption's image.

    Raises:
        ValueError: a cut-off is beyond ``ranks.depth``, ``text_image`` has another length, or there are no images.
    """
    recalls = _recalls(ranks, text_image, ks, resamples, seed)
    return _named(100 * recalls, 100 * recalls.mean(axis=1), ks)


def bootstrap_mean_recall(
    ranks: RetrievalRanks, text_image: NDArray[np.int64], resamples: int = RESAMPLES, seed: int = 0
) -> NDArray[np.float64]:
    """Return the mean of all recalls on each resample of the images, in percent, (resamples,).

    Models that are measured on the same images get the same resamples: their differences can be taken draw by draw.

    Raises:
        ValueError: as :func:`bootstrap_recalls`.
    """
    means: NDArray[np.float64] = 100 * _recalls(ranks, text_image, RECALL_KS, resamples, seed).mean(axis=1)
    return means


def bootstrap_share(
    student: RetrievalRanks,
    teacher: RetrievalRanks,
    text_image: NDArray[np.int64],
    ks: Sequence[int] = RECALL_KS,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> RecallIntervals:
    """Return an interval for each share of ``recall.retention``.

    Both are measured on the same resamples.

    Args:
        student, teacher: ranks of the same queries.

    Raises:
        ValueError: as :func:`bootstrap_recalls`, or student and teacher have different queries.
    """
    if student.i2t.shape != teacher.i2t.shape or student.t2i.shape != teacher.t2i.shape:
        raise ValueError(
            f"student and teacher were asked other queries: {len(student.i2t)} and {len(teacher.i2t)} images, "
            f"{len(student.t2i)} and {len(teacher.t2i)} captions"
        )
    part, whole = (_recalls(ranks, text_image, ks, resamples, seed) for ranks in (student, teacher))
    return _named(_percent(part, whole), _percent(part.mean(axis=1), whole.mean(axis=1)), ks)


def bootstrap_accuracy_share(
    student: NDArray[Any], teacher: NDArray[Any], resamples: int = RESAMPLES, seed: int = 0
) -> Interval | None:
    """Return an interval for the student's accuracy as a share of the teacher's, in percent, on the same resamples.

    Args:
        student, teacher: (images,) bool, True if correct, for the same images.

    Returns:
        The interval, or None if the teacher has no correct image in a resample.

    Raises:
        ValueError: there are no images, or the numbers of images differ.
    """
    if student.shape != teacher.shape:
        raise ValueError(f"student and teacher classified other images: {student.shape} and {teacher.shape}")
    sums = resampled_sums(np.stack([student, teacher], axis=1), resamples, seed)
    return _interval(_percent(sums[:, 0], sums[:, 1]))


def _recalls(
    ranks: RetrievalRanks, text_image: NDArray[np.int64], ks: Sequence[int], resamples: int, seed: int
) -> NDArray[np.float64]:
    """Return recalls from 0 to 1, (resamples, 2 * ks), i2t first; t2i is NaN in a resample without captions."""
    if min(ks) < 1 or max(ks) > ranks.depth:
        raise ValueError(f"cut-offs {tuple(ks)}: ranks were looked for down to {ranks.depth}")
    if text_image.shape != ranks.t2i.shape:
        raise ValueError(f"{len(text_image)} captions in text_image, {len(ranks.t2i)} in ranks")
    images = len(ranks.i2t)
    columns: list[NDArray[Any]] = [(ranks.i2t > 0) & (ranks.i2t <= k) for k in ks]
    for k in ks:
        hits = (ranks.t2i > 0) & (ranks.t2i <= k)
        columns.append(np.bincount(text_image[hits], minlength=images))
    columns.append(np.bincount(text_image, minlength=images))  # captions of each image
    sums = resampled_sums(np.stack(columns, axis=1), resamples, seed)
    totals = np.where(sums[:, -1:] > 0, sums[:, -1:], np.nan)
    return np.concatenate([sums[:, : len(ks)] / images, sums[:, len(ks) : -1] / totals], axis=1)


def _percent(part: NDArray[np.float64], whole: NDArray[np.float64]) -> NDArray[np.float64]:
    share: NDArray[np.float64] = 100 * part / np.where(whole > 0, whole, np.nan)
    return share


def _named(values: NDArray[np.float64], mean: NDArray[np.float64], ks: Sequence[int]) -> RecallIntervals:
    intervals = [_interval(column) for column in values.T]
    names = [f"R@{k}" for k in ks]
    return RecallIntervals(
        i2t=dict(zip(names, intervals[: len(ks)], strict=True)),
        t2i=dict(zip(names, intervals[len(ks) :], strict=True)),
        mean=_interval(mean),
    )


def _interval(values: NDArray[np.float64]) -> Interval | None:
    if np.isnan(values).any():
        return None
    low, high = np.quantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(low=float(low), high=float(high))
