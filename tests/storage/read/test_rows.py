"""Row numbers as bits: the rows that were put in, whatever way, in little memory."""

from __future__ import annotations

import tracemalloc
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from teacher_cache.storage.read.rows import RowSet


@given(
    mask=st.lists(st.booleans(), max_size=300),
    cuts=st.lists(st.integers(0, 300), max_size=5),
    ends=st.tuples(st.integers(0, 320), st.integers(0, 320)),
    chunk_rows=st.integers(1, 70),
)
def test_what_was_put_in_is_there(mask: list[bool], cuts: list[int], ends: tuple[int, int], chunk_rows: int) -> None:
    """In parts that begin anywhere, or by number in any order."""
    wanted = np.flatnonzero(mask).tolist()
    by_parts = RowSet(len(mask))
    edges = [0, *sorted(min(cut, len(mask)) for cut in cuts), len(mask)]
    for start, stop in pairwise(edges):
        by_parts.add(start, np.array(mask[start:stop], bool))
    by_number = RowSet.of(np.array(wanted[::-1], np.int64))
    start, stop = sorted(ends)
    for found in (by_parts, by_number):
        assert len(found) == len(wanted)
        assert found.numbers().tolist() == wanted
        assert found.numbers(start, stop).tolist() == [row for row in wanted if start <= row < stop]
        assert np.concatenate([[], *found.parts(chunk_rows)]).tolist() == wanted
        assert found.chunks(chunk_rows).tolist() == sorted({row // chunk_rows for row in wanted})
    assert RowSet.of(by_parts) is by_parts


@given(total=st.integers(0, 40), lost=st.sets(st.integers(0, 39)))
def test_all_rows_but_some(total: int, lost: set[int]) -> None:
    found = RowSet(total, full=True)
    assert len(found) == total
    for row in lost & set(range(total)):
        found.remove(row)
    assert found.numbers().tolist() == [row for row in range(total) if row not in lost]
    assert len(found) == total - len(lost & set(range(total)))


def test_a_mask_that_is_too_long_is_refused() -> None:
    with pytest.raises(IndexError, match="rows are 0 to 9, a mask reaches to 10"):
        RowSet(10).add(8, np.ones(3, bool))


def test_a_million_rows_take_a_bit_each() -> None:
    tracemalloc.start()
    try:
        found = RowSet(1_000_000, full=True)
        assert len(found) == 1_000_000
        assert tracemalloc.get_traced_memory()[0] < 500_000  # bytes: a byte for each row would be a million
        assert sum(len(part) for part in found.parts()) == 1_000_000
        found.chunks(4096)
        assert tracemalloc.get_traced_memory()[1] < 3_000_000  # some parts as numbers, however many rows there are
    finally:
        tracemalloc.stop()
