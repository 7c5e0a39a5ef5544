"""Where an image's captions are, in a byte for each image at most: as offsets of 8 bytes would say it."""

from __future__ import annotations

import tracemalloc
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from teacher_cache.storage.errors import CacheCorruptError
from teacher_cache.storage.read.caption_index import CaptionIndex

COUNTS = st.lists(st.one_of(st.integers(0, 6), st.just(0), st.sampled_from([255, 256, 70_000])), max_size=200)
# several blocks of 256, of images that have equally many and of others
RUNS = st.lists(st.tuples(st.integers(0, 3), st.sampled_from([1, 100, 255, 256, 257, 512, 700])), max_size=8)


CUTS = st.lists(st.integers(0, 2000), max_size=6)


def says_what_offsets_say(counts: list[int], cuts: list[int], asked: list[int]) -> None:
    owners = np.repeat(np.arange(len(counts)), counts)
    edges = [0, *sorted(min(cut, len(owners)) for cut in cuts), len(owners)]
    index = CaptionIndex(len(counts), (owners[start:stop] for start, stop in pairwise(edges)), "x")
    offsets = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)]).astype(np.int64)
    assert index.offsets().tolist() == offsets.tolist()
    rows = np.array([row for row in asked if row < len(counts)], np.int64)
    assert index.counts(rows).tolist() == [counts[row] for row in rows]
    # the one behind the last image too
    ends = np.array([*rows, len(counts)], np.int64)
    assert index.starts(ends).tolist() == offsets[ends].tolist()
    captions, positions = index.captions_of(rows)
    assert captions.tolist() == [caption for row in rows for caption in range(offsets[row], offsets[row + 1])]
    assert positions.tolist() == [at for at, row in enumerate(rows) for _ in range(counts[row])]


@given(counts=COUNTS, cuts=CUTS, asked=st.lists(st.integers(0, 200), max_size=30))
def test_it_says_what_offsets_say(counts: list[int], cuts: list[int], asked: list[int]) -> None:
    """However the table is parted, and with more captions of an image than a byte can count."""
    says_what_offsets_say(counts, cuts, asked)


@given(runs=RUNS, cuts=CUTS, asked=st.lists(st.integers(0, 5600), max_size=30))
def test_blocks_of_images_that_have_equally_many_say_it_too(
    runs: list[tuple[int, int]], cuts: list[int], asked: list[int]
) -> None:
    says_what_offsets_say([each for each, images in runs for _ in range(images)], cuts, asked)


@pytest.mark.parametrize("row", [-1, 3])
def test_an_image_that_there_is_not_has_no_captions(row: int) -> None:
    index = CaptionIndex(3, [np.array([0, 0, 2])], "x")
    with pytest.raises(IndexError, match=f"images are 0 to 2, asked for {row}"):
        index.captions_of(np.array([row]))


@pytest.mark.parametrize("parts", [[[0, 2, 1]], [[0, 2], [1]], [[-1, 2]], [[0, 10]]])
def test_captions_in_disorder_are_refused(parts: list[list[int]]) -> None:
    with pytest.raises(CacheCorruptError, match="c/captions: not sorted by image row from 0 to 9"):
        CaptionIndex(10, (np.array(part) for part in parts), "c/captions")


@pytest.mark.parametrize(("one_has", "bytes_each"), [(5, 0.05), (6, 1.1)])
def test_a_million_images_take_a_byte_each_where_they_differ_and_next_to_nothing_where_not(
    one_has: int, bytes_each: float
) -> None:
    """Of 100 images one has as many captions as said, the others 5. While it is made, a part of the table beside it.

    Offsets would take 8 bytes. Other threads of this process allocate too, so the limit leaves them a megabyte.
    """
    images, at_once = 1_000_000, 10_000
    counts = np.where(np.arange(at_once) % 100, 5, one_has)
    owners = (np.repeat(np.arange(first, first + at_once), counts) for first in range(0, images, at_once))
    tracemalloc.start()
    try:
        index = CaptionIndex(images, owners, "x")
        kept, peak = tracemalloc.get_traced_memory()
        assert kept < bytes_each * images
        assert peak < kept + 3 * images
        assert index.starts(np.arange(images + 1)[::-1])[0] == images // at_once * counts.sum()
    finally:
        tracemalloc.stop()
