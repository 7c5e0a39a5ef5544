"""How long calls take, measured in turns: each round runs every entry once, so that all of them meet the same machine.

A machine is slower in one minute than in the next: a neighbour, a clock that drops, a page cache. Two models timed one
after the other differ by that too; two that alternate differ by it only within a round, and the ratios of the
rounds say how much is left. No torch: what is called is up to the caller.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

import numpy as np
from pydantic import BaseModel, Field, computed_field

__all__ = ["Ratio", "Timing", "interleaved", "speed_ratio"]

_LOW, _HIGH = 5.0, 95.0


class Ratio(BaseModel, frozen=True):
    """Speed of one entry as a multiple of another's, over the ratios of all rounds."""

    median: float
    low: float = Field(description="Ratio that a twentieth of the rounds is below; the spread, no error of the median.")
    high: float = Field(description="Ratio that a twentieth of the rounds is above.")
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

    @computed_field(description="95th percentile, between neighbours if it must; close to the longest of few calls.")  # type: ignore[prop-decorator]
    @property
    def p95_ms(self) -> float:
        """95th percentile of the calls, in milliseconds; linear between neighbours."""
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
    """Time every entry once a round, in an order that is drawn anew for each round.

    Random, not rotated: in a rotation each entry always runs behind the same one, and on what that left in the caches.

    Args:
        work: by name. A call is over when it returns, so one that uses a GPU waits for it.
        rounds: measured calls of each entry.
        warmup: rounds before these that are not measured: kernels are chosen and memory is taken at the first call.
        batch: images, or captions, that a call handles; of all entries.
        seed: of the orders.
        clock: seconds, never going back.
        progress: called with the number of measured rounds that are done.

    Returns:
        By name, in the order of ``work``. The n-th seconds of all entries are of the same round.

    Raises:
        ValueError: no round, or a negative warmup.
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
        timing, reference: of one :func:`interleaved` run, or of two whose batches differ.

    Raises:
        ValueError: not the same number of rounds, so they are of different runs; or a call took no time.
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
