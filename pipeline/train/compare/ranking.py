"""Rank teachers, and tell which differences are certain. Pure functions of arrays; no torch.

Two things could have come out otherwise: which images were measured, and the seeds of the students. The first is
resampled (``teacher_cache.pipeline.evaluate.intervals``), all teachers on the same draws. The second is the variance
within each teacher's runs, pooled over the teachers, as in a one-way analysis of variance (Student's t with
teachers x (seeds - 1) degrees of freedom). The interval of a difference holds both: each resample gets a draw of t.

The level is shared by all pairs (Bonferroni): at 95 %, the chance that any pair is called different while all teachers
are equal is 5 % at most.
"""

from __future__ import annotations

from itertools import combinations
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from teacher_cache.pipeline.train.compare.result import Between

_Floats = NDArray[np.float64]


class Pair(NamedTuple):
    """The difference between two teachers, by their numbers."""

    better: int
    worse: int
    points: Between

    @property
    def certain(self) -> bool:
        """True if the interval does not hold 0."""
        return self.points.low > 0


class Ranking(NamedTuple):
    """The ranks of teachers.

    Attributes:
        teachers: mean over the seeds of each teacher, with its own interval at the level.
        order: numbers of the teachers, the best first.
        pairs: all pairs, with intervals at the level that all pairs share; empty with one seed.
    """

    teachers: tuple[Between, ...]
    order: tuple[int, ...]
    pairs: tuple[Pair, ...]


def rank_teachers(recalls: _Floats, draws: _Floats, level: float, seed: int = 0) -> Ranking:
    """Rank teachers by the recall of their students.

    Args:
        recalls: (teachers, seeds) recall of each student, in percent.
        draws: (teachers, resamples) mean over the seeds of the recall on each resample of the images, in percent; the
            resamples are the same for all teachers.
        level: probability that the intervals hold, for example 0.95.
        seed: seed of the draws of t.
    """
    teachers, seeds = recalls.shape
    means = recalls.mean(axis=1)
    order = tuple(int(number) for number in np.argsort(-means, kind="stable"))
    if seeds < 2:
        return Ranking(tuple(_spread(mean, of, level) for mean, of in zip(means, draws, strict=True)), order, ())
    freedom = teachers * (seeds - 1)
    deviation = np.sqrt(((recalls - means[:, None]) ** 2).sum() / freedom / seeds)  # of a mean over the seeds
    noise = deviation * np.random.default_rng(seed).standard_t(freedom, draws.shape[1])
    shared = 1 - (1 - level) / (teachers * (teachers - 1) / 2)
    pairs = [
        Pair(
            first, second, _spread(means[first] - means[second], draws[first] - draws[second] + 2**0.5 * noise, shared)
        )
        for first, second in combinations(order, 2)
    ]
    return Ranking(
        tuple(_spread(mean, of + noise, level) for mean, of in zip(means, draws, strict=True)), order, tuple(pairs)
    )


def rivals(ranking: Ranking) -> list[int]:
    """Return the teachers that the best one is not certainly better than, best first; all others with one seed."""
    beaten = {pair.worse for pair in ranking.pairs if pair.certain and pair.better == ranking.order[0]}
    return [number for number in ranking.order[1:] if number not in beaten]


def _spread(value: float, draws: _Floats, level: float) -> Between:
    low, high = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2])
    return Between(value=value, low=low, high=high)
