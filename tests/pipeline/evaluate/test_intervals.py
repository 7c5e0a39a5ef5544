"""Bootstrap intervals: equal to a slow loop over the same draws, of the width that theory wants, paired."""

from __future__ import annotations

import numpy as np
import pytest

from teacher_cache.pipeline.evaluate import intervals
from teacher_cache.pipeline.evaluate.intervals import (
    Interval,
    bootstrap_accuracy_share,
    bootstrap_recalls,
    bootstrap_share,
    resampled_sums,
)
from teacher_cache.pipeline.evaluate.recall import RetrievalRanks, mean_recall, recall_of_ranks, retention

KS = (1, 5, 10)


def some_ranks(seed: int, text_image: np.ndarray, images: int, skill: float = 0.5) -> RetrievalRanks:
    """Ranks down to 10, those of an image's captions alike."""
    rng = np.random.default_rng(seed)
    hard = rng.exponential(6 * (1 - skill), images)
    i2t = np.ceil(hard * rng.uniform(0.5, 1.5, images) + 0.01)
    t2i = np.ceil(hard[text_image] * rng.uniform(0.5, 2, len(text_image)) + 0.01)
    return RetrievalRanks(*(np.where(found > 10, 0, found).astype(np.int32) for found in (i2t, t2i)), depth=10)


def captions_of(seed: int, images: int) -> np.ndarray:
    """Between no and seven captions per image, side by side."""
    return np.repeat(np.arange(images), np.random.default_rng(seed).integers(0, 8, images))


def naive_resamples(seed: int, resamples: int, text_image: np.ndarray, *of: RetrievalRanks) -> list[list[dict]]:
    """Each resample written out: its images one by one with their captions, and the recall of exactly these queries."""
    images = len(of[0].i2t)
    rng = np.random.default_rng(seed)
    found: list[list[dict]] = []
    for _ in range(resamples):
        picked = [int(rng.integers(0, images)) for _ in range(images)]
        captions = [caption for image in picked for caption in np.flatnonzero(text_image == image)]
        found.append([recall_of_ranks(RetrievalRanks(ranks.i2t[picked], ranks.t2i[captions], 10), KS) for ranks in of])
    return found


def between(values: list[float]) -> tuple[float, float]:
    """The 2.5th and the 97.5th percentile, by sorting."""
    ordered = sorted(values)

    def at(share: float) -> float:
        place = share * (len(ordered) - 1)
        below = int(place)
        above = min(below + 1, len(ordered) - 1)
        return ordered[below] + (place - below) * (ordered[above] - ordered[below])

    return at(0.025), at(0.975)


def same(found: Interval | None, values: list[float]) -> None:
    assert found is not None
    assert (found.low, found.high) == pytest.approx(between(values), abs=1e-9)


def test_intervals_equal_a_slow_loop_over_the_same_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    images = 37
    text_image = captions_of(0, images)
    student, teacher = some_ranks(1, text_image, images, 0.3), some_ranks(2, text_image, images, 0.7)
    drawn = naive_resamples(5, 150, text_image, student, teacher)
    monkeypatch.setattr(intervals, "_BLOCK_BYTES", 8 * images * 7)  # blocks of 7 resamples, and a last one of 3
    recalls = bootstrap_recalls(student, text_image, KS, resamples=150, seed=5)
    shares = bootstrap_share(student, teacher, text_image, KS, resamples=150, seed=5)
    for direction in ("i2t", "t2i"):
        for name in ("R@1", "R@5", "R@10"):
            same(getattr(recalls, direction)[name], [one[direction][name] for one, _ in drawn])
            kept = [retention(one, other)[direction][name] for one, other in drawn]
            same(getattr(shares, direction)[name], kept)
    same(recalls.mean, [mean_recall(one) for one, _ in drawn])
    same(shares.mean, [retention(one, other)["mean"] for one, other in drawn])


def accuracy_interval(hits: np.ndarray, resamples: int, seed: int) -> Interval:
    """Of an accuracy: the share of a teacher that is always right."""
    found = bootstrap_accuracy_share(hits, np.ones_like(hits), resamples, seed)
    assert found is not None
    return found


def test_intervals_are_those_of_scipy() -> None:
    stats = pytest.importorskip("scipy.stats")
    rng = np.random.default_rng(0)
    teacher = rng.random(200) < 0.8
    student = teacher & (rng.random(200) < 0.9)

    def share(ours: np.ndarray, theirs: np.ndarray, axis: int = -1) -> np.ndarray:
        return 100 * ours.sum(axis=axis) / theirs.sum(axis=axis)

    theirs = stats.bootstrap(
        (student.astype(float), teacher.astype(float)),
        share,
        paired=True,
        n_resamples=2000,
        method="percentile",
        rng=np.random.default_rng(0),
    ).confidence_interval
    ours = bootstrap_accuracy_share(student, teacher)
    assert ours is not None
    assert (ours.low, ours.high) == (pytest.approx(theirs.low), pytest.approx(theirs.high))


def test_the_interval_covers_the_truth_as_often_as_it_says() -> None:
    """300 times 400 images, of which 70 % are hit by chance: 95 % of the intervals have the 70 within, give or take."""
    rng = np.random.default_rng(0)
    found = [accuracy_interval(rng.random(400) < 0.7, 400, seed) for seed in range(300)]
    covered = np.mean([interval.low <= 70 <= interval.high for interval in found])
    # three standard errors of a share of 0.95 among 300 are 0.038, and the percentile interval is a little short
    assert 0.90 <= covered <= 0.99
    # normal theory: 2 x 1.96 standard errors
    wide = np.mean([interval.high - interval.low for interval in found])
    assert wide == pytest.approx(2 * 1.96 * 100 * np.sqrt(0.7 * 0.3 / 400), rel=0.05)


def test_captions_of_an_image_are_drawn_together() -> None:
    """Five captions that are hit or missed together are worth one: sqrt(5) times the width of independent ones."""
    images = 400
    rng = np.random.default_rng(3)
    text_image = np.repeat(np.arange(images), 5)
    hit = rng.random(images) < 0.5
    together = RetrievalRanks(hit.astype(np.int32), hit[text_image].astype(np.int32), 1)
    apart = RetrievalRanks(hit.astype(np.int32), (rng.random(5 * images) < 0.5).astype(np.int32), 1)
    widths = []
    for ranks in (together, apart):
        found = bootstrap_recalls(ranks, text_image, (1,)).t2i["R@1"]
        assert found is not None
        widths.append(found.high - found.low)
    assert widths[0] / widths[1] == pytest.approx(np.sqrt(5), rel=0.1)


def test_a_paired_interval_is_narrower_than_an_unpaired_one() -> None:
    """A student that misses what its teacher misses, and a little more: the hard images cancel in the ratio."""
    images = 500
    rng = np.random.default_rng(4)
    text_image = np.repeat(np.arange(images), 2)
    hit = rng.random(images) < 0.6
    teacher = RetrievalRanks(hit.astype(np.int32), hit[text_image].astype(np.int32), 1)
    kept = hit & (rng.random(images) < 0.95)
    student = RetrievalRanks(kept.astype(np.int32), kept[text_image].astype(np.int32), 1)
    paired = bootstrap_share(student, teacher, text_image, (1,)).mean
    assert paired is not None
    columns = [found[:, None] for found in (kept, hit)]
    one, other = (resampled_sums(column, seed=seed)[:, 0] for seed, column in enumerate(columns))
    low, high = np.quantile(100 * one / other, [0.025, 0.975])
    assert paired.high - paired.low < 0.5 * (high - low)
    assert paired.low < 100 * kept.sum() / hit.sum() < paired.high
    # a student that is its teacher keeps 100 %, without doubt
    assert bootstrap_share(teacher, teacher, text_image, (1,)).mean == Interval(low=100, high=100)


def test_what_cannot_be_divided_has_no_interval() -> None:
    """One hit of the teacher in ten images: a third of the resamples are without it, and their ratio is undefined."""
    text_image = np.arange(10)
    one = np.zeros(10, np.int32)
    one[3] = 1
    teacher, student = RetrievalRanks(one, one, 1), RetrievalRanks(0 * one, one, 1)
    found = bootstrap_share(student, teacher, text_image, (1,))
    assert (found.i2t, found.t2i, found.mean) == ({"R@1": None}, {"R@1": None}, None)
    assert bootstrap_recalls(teacher, text_image, (1,)).i2t["R@1"] == Interval(low=0, high=30)
    assert bootstrap_accuracy_share(one > 0, one > 0) is None


def test_what_does_not_fit_together_is_refused() -> None:
    ranks = RetrievalRanks(np.ones(3, np.int32), np.ones(6, np.int32), 10)
    fewer = RetrievalRanks(np.ones(2, np.int32), np.ones(6, np.int32), 10)
    text_image = np.repeat(np.arange(3), 2)
    with pytest.raises(ValueError, match="other queries: 2 and 3 images, 6 and 6 captions"):
        bootstrap_share(fewer, ranks, text_image)
    with pytest.raises(ValueError, match=r"cut-offs \(1, 20\): ranks were looked for down to 10"):
        bootstrap_recalls(ranks, text_image, (1, 20))
    with pytest.raises(ValueError, match="5 captions in text_image, 6 in ranks"):
        bootstrap_recalls(ranks, text_image[:5])
    with pytest.raises(ValueError, match="0 images and 2000 resamples"):
        bootstrap_accuracy_share(np.zeros(0, bool), np.zeros(0, bool))
    with pytest.raises(ValueError, match=r"other images: \(3,\) and \(2,\)"):
        bootstrap_accuracy_share(np.ones(3, bool), np.ones(2, bool))
