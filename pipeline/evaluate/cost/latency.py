"""Latency of calls, interleaved: each round runs every entry once, so that all entries share the machine's conditions.

The speed of a machine changes from minute to minute: other processes, clock frequency, page cache. Models timed one
after the other differ by that too. Interleaved models differ by it only within a round, and the spread of the rounds'
ratios shows how much. No torch.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

import numpy as np
from pydantic import BaseModel, Field, computed_field

_LOW, _HIGH = 5.0, 95.0


class Ratio(BaseModel, frozen=True):
    """Speed of one entry as a multiple of another's: percentiles over the ratios of all rounds."""

    median: float
    low: float = Field(description="5th percentile of the rounds' ratios: their spread, not the error of the median.")
    high: float = Field(description="95th percentile of the rounds' ratios.")
    rounds: int


class Timing(BaseModel, frozen=True):
    """Durations of the calls of one entry."""

    batch: int = Field(gt=0, description="Number of images, or captions, per call.")
    seconds: tuple[float, ...] = Field(min_length=1, description="Seconds of each round, in order.")

    @computed_field(description="Median of the calls, in milliseconds.")  # type: ignore[prop-decorator]
    @property
    def p50_ms(self) -> float:
        """Median of the calls, in milliseconds."""
        return 1e3 * float(np.percentile(self.seconds, 50))

    @computed_field(description="95th percentile in milliseconds, interpolated; with few calls close to the longest.")  # type: ignore[prop-decorator]
    @property
    def p95_ms(self) -> float:
        """95th percentile of the calls, in milliseconds, linearly interpolated."""
        return 1e3 * float(np.percentile(self.seconds, _HIGH))

    @computed_field(description="Images, or captions, per second at the median.")  # type: ignore[prop-decorator]
    @property
    def per_second(self) -> float:
        """Images, or captions, per second at the median."""
        return 1e3 * self.batch / self.p50_ms


def interleaved(
    work: Mapping[str, Callable[[], object]],
    rounds: int,
    warmup: int = 1,
    batch: int = 1,
    seed: int = 0,
    clock: Callable[[], float] = time.perf_counter,
    progress: Callable[[int], None] | None = None,
) -> dict[str, Timing]:
    """Time every entry once per round, in a new random order each round.

    In a rotation each entry would always run after the same one, with the CPU caches which that one filled.

    Args:
        work: calls by name. A call that uses a GPU must wait for it before it returns.
        rounds: number of measured calls of each entry.
        warmup: number of rounds before, which are not measured: first calls choose kernels and allocate memory.
        batch: number of images, or captions, per call.
        seed: seed of the orders.
        clock: monotonic clock in seconds.
        progress: called with the number of measured rounds so far.

    Returns:
        Timings by name, in the order of ``work``. The n-th seconds of all entries belong to the same round.

    Raises:
        ValueError: ``rounds`` is below 1, or ``warmup`` is negative.
    """
    if rounds < 1 or warmup < 0:
        raise ValueError(f"rounds must be >= 1 and warmup >= 0, found {rounds} and {warmup}")
    order = np.random.default_rng(seed)
    names = list(work)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for number in range(-warmup, rounds):
        for index in order.permutation(len(names)):
            name = names[index]
            started = clock()
            work[name]()
            took = clock() - started
            if number >= 0:
                seconds[name].append(took)
        if progress is not None and number >= 0:
            progress(number + 1)
    return {name: Timing(batch=batch, seconds=tuple(taken)) for name, taken in seconds.items()}


def speed_ratio(timing: Timing, reference: Timing) -> Ratio:
    """Return the speed as a multiple of the reference's, round by round.

    Args:
        timing, reference: timings from one :func:`interleaved` run, or from two whose batches differ.

    Raises:
        ValueError: the numbers of rounds differ, or a call took no time.
    """
    if len(timing.seconds) != len(reference.seconds):
        raise ValueError(
            f"{len(timing.seconds)} and {len(reference.seconds)} rounds: only calls of the same rounds can be compared"
        )
    ours, theirs = np.array(timing.seconds), np.array(reference.seconds)
    if not (ours > 0).all() or not (theirs > 0).all():
        raise ValueError("a call took no time by its clock; measure larger batches")
    ratios = (theirs / reference.batch) / (ours / timing.batch)
    low, median, high = np.percentile(ratios, [_LOW, 50, _HIGH])
    return Ratio(median=float(median), low=float(low), high=float(high), rounds=len(ratios))
