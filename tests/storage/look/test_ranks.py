"""Ranks counted in tiles equal a brute count in float64: ties, near-ties, any tile, thread and way to decide."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from threadpoolctl import threadpool_info

from teacher_cache.storage.look import ranks as ranks_module
from teacher_cache.storage.look.nearest import unit_rows
from teacher_cache.storage.look.ranks import NO_POSITIVE, first_positive_ranks

Array = np.ndarray[Any, Any]


def counted(image: Array, text: Array, text_image: Array, depth: int | None = None) -> tuple[list[int], list[int]]:
    """From all scores in float64, query by query."""
    scores = np.einsum("nd,md->nm", image.astype(np.float64), text.astype(np.float64))
    positive = text_image == np.arange(len(image))[:, None]
    both = []
    for table, own in ((scores, positive), (scores.T, positive.T)):
        found = []
        for row, wanted in zip(table, own, strict=True):
            if wanted.any():
                best = row[wanted].max()
                first = np.flatnonzero(wanted & (row == best))[0]
                before = int((row > best).sum()) + int((row[:first] == best).sum())
                found.append(before if depth is None else min(before, depth))
            else:
                found.append(NO_POSITIVE)
        both.append(found)
    return both[0], both[1]


def equal(found: tuple[Array, Array], wanted: tuple[list[int], list[int]]) -> None:
    for some, theirs in zip(found, wanted, strict=True):
        assert some.dtype == np.int64
        assert some.tolist() == theirs


KINDS = {
    # whole runs of exact ties
    "duplicates": lambda rng, rows, dim: unit_rows(rng.standard_normal((7, dim)))[rng.integers(0, 7, rows)],
    # ties of vectors that differ
    "coarse": lambda rng, rows, dim: rng.integers(-1, 2, (rows, dim)).astype(np.float32) * np.float32(0.1),
    "random": lambda rng, rows, dim: unit_rows(rng.standard_normal((rows, dim))),
    # within float32's rounding error of each other, and within float64's
    "collapsed": lambda rng, rows, dim: unit_rows(np.ones(dim) + 1e-6 * rng.standard_normal((rows, dim))),
    "equal": lambda rng, rows, dim: unit_rows(np.full((rows, dim), 0.3)),
    "last bits": lambda rng, rows, dim: np.nextafter(
        np.float32(0.3), rng.choice(np.array([0, 1], np.float32), (rows, dim))
    ),
}


@settings(max_examples=300, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    kinds=st.tuples(st.sampled_from(sorted(KINDS)), st.sampled_from(sorted(KINDS))),
    images=st.integers(1, 25),
    captions=st.integers(1, 70),
    dim=st.integers(1, 20),
    depth=st.one_of(st.none(), st.integers(1, 80)),
    tiles=st.sampled_from([(3, 2, 5), (8, 5, 9), (4096, 256, 1024)]),
    sparse=st.sampled_from([1, 4, 10**9]),
    product=st.sampled_from([0, 24]),
    threads=st.sampled_from([1, 3]),
    stored=st.sampled_from([np.float32, np.float16]),
)
def test_counted_in_tiles_equals_a_brute_count(
    seed: int,
    kinds: tuple[str, str],
    images: int,
    captions: int,
    dim: int,
    depth: int | None,
    tiles: tuple[int, int, int],
    sparse: int,
    product: int,
    threads: int,
    stored: Any,
) -> None:
    """Images with any number of captions or none; each way to decide forced and left to itself."""
    rng = np.random.default_rng(seed)
    image, text = KINDS[kinds[0]](rng, images, dim).astype(stored), KINDS[kinds[1]](rng, captions, dim).astype(stored)
    text_image = rng.integers(0, images, captions)
    with pytest.MonkeyPatch.context() as patch:
        for name, size in zip(("_IMAGES_AT_ONCE", "_TILE_IMAGES", "_TILE_TEXTS"), tiles, strict=True):
            patch.setattr(ranks_module, name, size)
        patch.setattr(ranks_module, "_SPARSE", sparse)
        patch.setattr(ranks_module, "_PAIRS_FOR_PRODUCT", product)
        patch.setattr(ranks_module, "_PAIRS_AT_ONCE", 16)
        patch.setattr(os, "cpu_count", lambda: threads)
        found = first_positive_ranks(image, text, text_image, depth)
    equal(found, counted(image, text, text_image, depth))


def test_wide_tiles_and_many_threads_count_all_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    """More than a byte's worth per tile in either direction, of embeddings that tell little apart."""
    monkeypatch.setattr(os, "cpu_count", lambda: 5)
    rng = np.random.default_rng(1)
    for noise in (1e-8, 1e-3, 1.0):
        image, text = (unit_rows(np.ones(64) + noise * rng.standard_normal((rows, 64))) for rows in (300, 2100))
        text_image = rng.integers(0, 300, 2100)
        for depth in (None, 10):
            equal(first_positive_ranks(image, text, text_image, depth), counted(image, text, text_image, depth))


@pytest.mark.parametrize("scale", [1e-30, 1e-19, 1e18, 1e25])
def test_scores_beyond_the_range_of_float32_are_counted_in_float64(scale: float) -> None:
    rng = np.random.default_rng(2)
    image, text = ((scale * rng.standard_normal((rows, 8))).astype(np.float32) for rows in (20, 90))
    image[0], text[7] = 0, 0
    text[40:] /= 1000
    text_image = rng.integers(0, 20, 90)
    found = first_positive_ranks(image, text, text_image)
    equal(found, counted(image, text, text_image))
    assert 0 < np.median(found[1]) < 19


def test_near_ties_are_decided_by_float64() -> None:
    """Rows that differ in the last bit of one value: float32 counts some of them wrongly, and that shows."""
    rng = np.random.default_rng(3)
    text = np.repeat(unit_rows(rng.standard_normal((6, 512))), 40, axis=0)
    for row, column in enumerate(rng.integers(0, 512, len(text))):
        text[row, column] = np.nextafter(text[row, column], np.float32(rng.choice([-1, 1])))
    image, text_image = text[::40] + np.float32(0.01), np.arange(240) % 6
    wanted = counted(image, text, text_image)
    equal(first_positive_ranks(image, text, text_image), wanted)
    rough = image @ text.T
    best = np.where(text_image == np.arange(6)[:, None], rough, -np.inf).max(axis=1)
    assert (rough > best[:, None]).sum(axis=1).tolist() != wanted[0]


def test_cosines_of_stored_halves_are_those_of_unit_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Made some at a time, in whatever company, rows come out as all at once."""
    monkeypatch.setattr(ranks_module, "_TILE_IMAGES", 7)
    monkeypatch.setattr(ranks_module, "_TILE_TEXTS", 11)
    monkeypatch.setattr(ranks_module, "_IMAGES_AT_ONCE", 13)
    rng = np.random.default_rng(4)
    image, text = (rng.standard_normal((rows, 33)).astype(np.float16) for rows in (40, 160))
    text_image = np.arange(160) // 4
    text[::5] = text[0]
    found = first_positive_ranks(image, text, text_image, cosine=True)
    equal(found, counted(unit_rows(image), unit_rows(text), text_image))
    equal(first_positive_ranks(image, text, text_image), counted(image, text, text_image))
    assert found[1].tolist() != first_positive_ranks(image, text, text_image)[1].tolist()


def test_progress_counts_images_and_blas_gets_its_threads_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks_module, "_IMAGES_AT_ONCE", 4)
    monkeypatch.setattr(ranks_module, "_TILE_TEXTS", 8)
    monkeypatch.setattr(os, "cpu_count", lambda: 2)

    def blas() -> list[int]:
        return [each["num_threads"] for each in threadpool_info() if each["user_api"] == "blas"]

    threads, seen, during = blas(), [], []

    def progress(done: int, total: int) -> None:
        seen.append((done, total))
        during.extend(blas())

    rows = unit_rows(np.random.default_rng(5).standard_normal((10, 4)))
    first_positive_ranks(rows, np.repeat(rows, 2, axis=0), np.repeat(np.arange(10), 2), progress=progress)
    assert seen == [(0, 10), (4, 10), (8, 10), (10, 10)]
    assert set(during) == {1}
    assert blas() == threads


def test_bad_values_are_refused() -> None:
    rows, owner = np.eye(3, dtype=np.float32), np.arange(3)
    with pytest.raises(ValueError, match=r"images \(3, 3\) and captions \(3, 2\) must both"):
        first_positive_ranks(rows, rows[:, :2], owner)
    with pytest.raises(ValueError, match=r"each of 3 captions a position in 0 ... 2"):
        first_positive_ranks(rows, rows, owner + 1)
    with pytest.raises(ValueError, match="depth is 0, at least 1"):
        first_positive_ranks(rows, rows, owner, 0)
    for value in (np.nan, np.inf):
        wrong = rows.copy()
        wrong[1, 1] = value
        for both in ((wrong, rows), (rows, wrong)):
            with pytest.raises(ValueError, match=r"images and captions must be finite$"):
                first_positive_ranks(*both, owner)
    with pytest.raises(ValueError, match="must be finite, no row all zeros"):
        first_positive_ranks(rows, rows * np.float32([[1], [0], [1]]), owner, cosine=True)
