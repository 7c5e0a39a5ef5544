"""Timing in turns, by a clock that the test moves."""

from __future__ import annotations

import statistics
from collections.abc import Callable

import pytest

from teacher_cache.pipeline.evaluate.cost.latency import Timing, interleaved, speed_ratio


class Machine:
    """A clock, and calls that move it; the machine may be slower in some rounds."""

    def __init__(self) -> None:
        self.now = 0.0
        self.calls: list[str] = []

    def takes(self, name: str, seconds: Callable[[int], float]) -> Callable[[], object]:
        def call() -> None:
            self.now += seconds(self.calls.count(name))
            self.calls.append(name)

        return call


def test_each_round_runs_every_entry_once_in_changing_order() -> None:
    machine = Machine()
    work = {name: machine.takes(name, lambda number: 1.0) for name in "abc"}
    done: list[int] = []
    found = interleaved(work, rounds=20, warmup=2, clock=lambda: machine.now, progress=done.append)
    rounds = [tuple(machine.calls[start : start + 3]) for start in range(0, 66, 3)]
    assert len(machine.calls) == 66
    assert all(sorted(names) == ["a", "b", "c"] for names in rounds)
    assert len(set(rounds)) == 6  # every order occurs
    # each entry runs behind each of the others
    assert {(first, second) for first, second, _ in rounds} >= {("a", "b"), ("b", "a"), ("c", "a"), ("a", "c")}
    assert list(found) == ["a", "b", "c"]
    assert {len(timing.seconds) for timing in found.values()} == {20}
    assert done == list(range(1, 21))


def test_neither_warmup_nor_time_between_calls_is_measured() -> None:
    machine = Machine()
    work = {"a": machine.takes("a", lambda number: 100.0 if number < 2 else 0.5 * number)}
    pause = machine.takes("pause", lambda number: 50.0)
    found = interleaved(work, rounds=3, warmup=2, clock=lambda: machine.now, progress=lambda done: pause() and None)
    assert found["a"].seconds == (1.0, 1.5, 2.0)
    with pytest.raises(ValueError, match="found 0 and 1"):
        interleaved(work, rounds=0)


def test_a_machine_that_slows_down_leaves_the_ratio() -> None:
    """Tenfold slower rounds move both medians and no ratio: what one after the other could not do."""
    machine = Machine()
    slow = [1, 1, 10, 10, 10, 3, 1, 10]
    work = {
        "teacher": machine.takes("teacher", lambda number: 0.060 * slow[number]),
        "student": machine.takes("student", lambda number: 0.020 * slow[number]),
    }
    found = interleaved(work, rounds=8, warmup=0, clock=lambda: machine.now)
    ratio = speed_ratio(found["student"], found["teacher"])
    assert (ratio.median, ratio.low, ratio.high) == pytest.approx((3.0, 3.0, 3.0))
    assert ratio.rounds == 8


def test_percentiles_and_rates_by_hand() -> None:
    timing = Timing(batch=32, seconds=tuple(number / 1000 for number in range(100, 0, -1)))
    assert timing.p50_ms == pytest.approx(statistics.median(range(1, 101)))
    assert timing.p95_ms == pytest.approx(95.05)  # place 94.05 of the ordered 1 to 100
    assert timing.per_second == pytest.approx(32 / 0.0505)
    assert Timing(batch=1, seconds=(0.25,)).p95_ms == 250.0
    # a reader in another language needs no percentiles of its own
    assert set(timing.model_dump()) == {"batch", "seconds", "p50_ms", "p95_ms", "per_second"}
    assert Timing.model_validate_json(timing.model_dump_json()) == timing


def test_ratios_by_hand() -> None:
    teacher = Timing(batch=1, seconds=(2.0, 3.0, 8.0))
    student = Timing(batch=1, seconds=(1.0, 3.0, 2.0))
    ratio = speed_ratio(student, teacher)  # 2, 1, 4
    assert ratio.median == 2.0
    assert ratio.low == pytest.approx(1.1)
    assert ratio.high == pytest.approx(3.8)
    # per item: 32 in the time of one
    assert speed_ratio(Timing(batch=32, seconds=(2.0,)), Timing(batch=1, seconds=(2.0,))).median == 32.0
    with pytest.raises(ValueError, match="3 and 1 rounds"):
        speed_ratio(teacher, Timing(batch=1, seconds=(1.0,)))
    with pytest.raises(ValueError, match="took no time"):
        speed_ratio(Timing(batch=1, seconds=(0.0,)), Timing(batch=1, seconds=(1.0,)))
