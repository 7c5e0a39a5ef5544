"""The training order is a permutation, and a pure function of its arguments."""

from __future__ import annotations

import tracemalloc

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from teacher_cache.storage.read.shuffle import RowDraws, batches, epoch_rng, window_order


@given(
    rows=st.sets(st.integers(0, 400), min_size=1),
    chunk_rows=st.integers(1, 50),
    window_chunks=st.integers(1, 10),
    seed=st.integers(0, 2**32),
    epoch=st.integers(0, 1000),
)
def test_an_epoch_is_a_permutation_and_repeats(
    rows: set[int], chunk_rows: int, window_chunks: int, seed: int, epoch: int
) -> None:
    wanted = np.array(sorted(rows))
    first = np.concatenate(list(window_order(wanted, chunk_rows, window_chunks, seed, epoch)))
    again = np.concatenate(list(window_order(wanted, chunk_rows, window_chunks, seed, epoch)))
    assert sorted(first.tolist()) == wanted.tolist()
    assert first.tolist() == again.tolist()


@given(
    rows=st.sets(st.integers(0, 400)),
    chunk_rows=st.integers(1, 50),
    window_chunks=st.integers(1, 10),
    seed=st.integers(0, 2**32),
)
def test_the_order_is_that_of_its_definition(rows: set[int], chunk_rows: int, window_chunks: int, seed: int) -> None:
    """Runs go on in the order that they began with: no change of the code may change it."""
    chunks: dict[int, list[int]] = {}
    for row in sorted(rows):
        chunks.setdefault(row // chunk_rows, []).append(row)
    groups = list(chunks.values())
    picked = epoch_rng(seed, 1, 0).permutation(len(groups)).tolist()
    wanted = []
    for number, start in enumerate(range(0, len(groups), window_chunks)):
        window = np.array([row for at in picked[start : start + window_chunks] for row in groups[at]])
        wanted.append(epoch_rng(seed, 1, number + 1).permutation(window).tolist())
    found = window_order(np.array(sorted(rows), np.int64), chunk_rows, window_chunks, seed, 1)
    assert [window.tolist() for window in found] == wanted


def test_an_order_takes_no_memory_for_each_row() -> None:
    """The numbers of the rows would take 8 bytes each."""
    rows = np.arange(1_000_000)
    next(window_order(rows[:10], 4096, 2, 0, 0))  # what the first order of a process imports is not counted
    tracemalloc.start()
    try:
        next(window_order(rows, 4096, 2, 0, 0))
        assert tracemalloc.get_traced_memory()[1] < 3 * len(rows)  # bytes
    finally:
        tracemalloc.stop()


def test_epochs_and_seeds_differ() -> None:
    rows = np.arange(100)
    orders = {
        tuple(np.concatenate(list(window_order(rows, 10, 3, seed, epoch)))) for seed in range(3) for epoch in range(3)
    }
    assert len(orders) == 9


def test_a_window_holds_whole_chunks_and_mixes_them() -> None:
    windows = list(window_order(np.arange(100), 10, 3, 0, 0))
    assert [len(window) for window in windows] == [30, 30, 30, 10]
    assert all(len(set(window // 10)) == 3 for window in windows[:3])
    assert len(set(windows[0][:10] // 10)) > 1


def test_batches_are_full_and_cross_windows() -> None:
    found = list(batches(iter([np.arange(5), np.arange(5, 7), np.arange(7, 11)]), 3))
    assert [batch.tolist() for batch in found] == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]


@given(
    rows=st.lists(st.integers(0, 199), max_size=60),
    chunk_rows=st.integers(1, 50),
    kept=st.integers(0, 5),
    split=st.integers(0, 60),
)
def test_a_rows_number_is_the_one_that_all_rows_together_would_give_it(
    rows: list[int], chunk_rows: int, kept: int, split: int
) -> None:
    """Whatever was asked for before it, and however little is kept."""
    everything = epoch_rng(3, 5, 7).random(200)
    draws, asked = RowDraws(3, 5, 7, chunk_rows, kept), np.array(rows, np.int64)
    for part in (asked[:split], asked[split:], asked[::-1]):
        assert np.array_equal(draws.of(part), everything[part])


def test_numbers_of_rows_stay_for_some_chunks_only() -> None:
    """Those of all 200 chunks would take 8 bytes a row."""
    draws = RowDraws(0, 0, 0, 1000, kept=3)
    draws.of(np.arange(10))  # what the first draw of a process imports is not counted
    tracemalloc.start()
    try:
        for chunk in range(200):
            draws.of(np.arange(1000 * chunk, 1000 * chunk + 1000))
        assert tracemalloc.get_traced_memory()[1] < 100 * 8 * 1000
    finally:
        tracemalloc.stop()
