"""What is given out, in which sizes, and what becomes of the chunks of a lost worker."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from teacher_cache.pipeline.precompute.handout import Handout
from teacher_cache.storage.format.commits import ChunkRef


def refs(count: int) -> list[ChunkRef]:
    return [ChunkRef("image", 0, number) for number in range(count)]


def test_spans_are_long_at_first_and_single_chunks_at_the_end() -> None:
    handout, sizes = Handout(refs(100)), []
    while span := handout.take(workers=2):
        sizes.append(len(span))
        handout.done(span)
    assert sizes == [8] * 5 + [7, 6, 5, 5, 4, 4, 3, 3, 2, 2, 2, 2] + [1] * 15
    assert handout.left == 0


def test_a_lost_workers_chunks_come_last_and_alone() -> None:
    handout = Handout(refs(32))
    span = handout.take(1)
    assert span == refs(8)
    handout.give_back(span[5:], ChildProcessError("gone"))
    handout.done(span[:5])
    order = []
    while got := handout.take(1):
        order.append(got)
        handout.done(got)
    assert order[-3:] == [[ref] for ref in refs(8)[5:]]
    assert sorted(ref for got in order for ref in got) == refs(32)[5:]


def test_the_chunk_that_ends_every_worker_is_named_and_its_neighbours_are_not() -> None:
    handout = Handout(refs(8))
    handout.give_back(handout.take(1), ChildProcessError("worker 1"))  # two chunks: of one worker's eight, a fourth
    poison, ended = ChunkRef("image", 0, 0), 1

    def work() -> None:
        nonlocal ended
        while span := handout.take(1):
            if poison in span:
                ended += 1
                handout.give_back(span, ChildProcessError(f"worker {ended}"))
            else:
                handout.done(span)

    with pytest.raises(ChildProcessError, match=r"chunk image/v0/000000 ended 3 workers .*; worker 3"):
        work()
    assert ended == 3


def test_an_error_of_the_moment_that_stays_is_raised_as_it_is() -> None:
    handout, error = Handout(refs(1)), TimeoutError("the store")
    for _ in range(2):
        handout.give_back(handout.take(1), error)
    with pytest.raises(TimeoutError, match="the store"):
        handout.give_back(handout.take(1), error)


def test_a_lost_node_does_not_count_against_its_chunks() -> None:
    handout = Handout(refs(1))
    for _ in range(50):
        handout.give_back(handout.take(1), None)
    assert handout.left == 1


@given(st.integers(0, 200), st.integers(1, 50), st.randoms(use_true_random=False))
def test_every_chunk_is_done_once_whatever_is_lost(count: int, workers: int, chance: object) -> None:
    handout, done = Handout(refs(count), tries=10**6), []
    while handout.left:
        span = handout.take(workers)
        assert span
        if chance.random() < 0.3:  # type: ignore[attr-defined]
            cut = chance.randrange(len(span))  # type: ignore[attr-defined]
            done += span[:cut]
            handout.done(span[:cut])
            handout.give_back(span[cut:], ChildProcessError("gone"))
        else:
            done += span
            handout.done(span)
    assert sorted(done) == refs(count)
    assert handout.take(workers) == []
