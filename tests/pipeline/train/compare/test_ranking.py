"""Which differences between teachers are called certain, and which neighbours they share. Drawn numbers, no model."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from teacher_cache.pipeline.train.compare.agreement import shared_neighbours
from teacher_cache.pipeline.train.compare.ranking import Ranking, rank_teachers, rivals

IMAGES, SEEDS, RESAMPLES = 60, 3, 800


def drawn(random: np.random.Generator, qualities: list[float], seed_points: float = 0.04) -> Ranking:
    """Rank teachers whose students find images with these probabilities, give or take a deviation between seeds."""
    difficulty = random.normal(0, 0.1, IMAGES)  # the same images for all
    hits: NDArray[np.float64] = np.stack(
        [
            [random.random(IMAGES) < quality + random.normal(0, seed_points) + difficulty for _ in range(SEEDS)]
            for quality in qualities
        ]
    ).astype(float)
    counts = random.multinomial(IMAGES, np.full(IMAGES, 1 / IMAGES), RESAMPLES)
    draws = 100 * hits.mean(axis=1) @ counts.T / IMAGES
    return rank_teachers(100 * hits.mean(axis=2), draws, 0.95)


def test_equal_teachers_are_seldom_called_different() -> None:
    """At 95 % for all three pairs together: of 400 comparisons 20 are expected, 35 are four deviations away."""
    random = np.random.default_rng(0)
    wrong = sum(any(pair.certain for pair in drawn(random, [0.5] * 3).pairs) for _ in range(400))
    assert 0 < wrong <= 35


def test_a_large_difference_is_certain_and_a_small_one_is_not() -> None:
    random = np.random.default_rng(1)
    rankings = [drawn(random, [0.2, 0.75, 0.7]) for _ in range(40)]
    apart = [{(pair.better, pair.worse): pair.certain for pair in one.pairs} for one in rankings]
    assert sum(pairs.get((1, 0), False) and pairs.get((2, 0), False) for pairs in apart) >= 38
    assert sum(pairs.get((1, 2), False) or pairs.get((2, 1), False) for pairs in apart) <= 4
    assert {one.order[2] for one in rankings} == {0}


def test_the_intervals_hold_the_truth_as_often_as_they_say() -> None:
    random = np.random.default_rng(2)
    within = [spread.low <= 50 <= spread.high for _ in range(150) for spread in drawn(random, [0.5, 0.5]).teachers]
    assert np.mean(within) > 0.92


def ranking(recalls: list[list[float]]) -> Ranking:
    """Rank teachers by these recalls; images leave no doubt."""
    values = np.array(recalls)
    return rank_teachers(values, np.repeat(values.mean(axis=1, keepdims=True), 1_000, axis=1), 0.95)


def test_the_rivals_are_those_that_the_best_does_not_beat_for_certain() -> None:
    ranked = ranking([[50, 52, 48], [10, 12, 11], [49, 51, 47]])
    assert ranked.order == (0, 2, 1)
    assert [(pair.better, pair.worse) for pair in ranked.pairs if pair.certain] == [(0, 1), (2, 1)]
    assert rivals(ranked) == [2]


def test_one_seed_makes_nothing_certain() -> None:
    ranked = ranking([[10], [50]])
    assert (ranked.order, ranked.pairs) == ((1, 0), ())
    assert rivals(ranked) == [0]


def test_shared_neighbours_are_those_that_a_plain_count_finds() -> None:
    random = np.random.default_rng(3)
    first, other = (random.normal(size=(40, dim)).astype(np.float32) for dim in (8, 5))
    turned = first @ np.linalg.qr(random.normal(size=(8, 8)))[0].astype(np.float32)
    shares = shared_neighbours([first, turned, other], k=4)

    def near(rows: NDArray[np.float32], row: int) -> set[int]:
        others = [at for at in range(40) if at != row]
        return set(sorted(others, key=lambda at: -float(rows[row] @ rows[at]))[:4])

    plain = np.mean([len(near(first, row) & near(other, row)) / 4 for row in range(40)])
    assert shares[0, 2] == shares[2, 0] == pytest.approx(plain)
    assert shares[0, 1] == 1  # a rotation changes no cosine
    assert np.isnan(shared_neighbours([first[:4], other[:4]], k=4)).all()
