"""A fan-out over many workers as events in time: hand-outs, losses, stale claims, a driver that serves one at a time.

The order of the work is that of ``teacher_cache.pipeline.precompute.handout.Handout`` itself; seconds come from the
caller. Used by ``benchmarks/scale.py``.
"""

from __future__ import annotations

import heapq
import random
from dataclasses import dataclass

from teacher_cache.pipeline.precompute.handout import Handout
from teacher_cache.storage.format.commits import ChunkRef


@dataclass(frozen=True)
class Fleet:
    """Seconds, and how often things break.

    Attributes:
        image_seconds, text_seconds: of one chunk at one worker, decoding and writing overlapped.
        span_seconds: at the start and the end of each span, where nothing overlaps.
        driver_seconds: of the driver, for each span that comes back; one at a time.
        lost_after_seconds: mean time until a worker is lost.
        new_after_seconds: until one that takes its place has loaded its teacher.
        stale_seconds: until a claim of a lost worker on another machine may be taken over.
    """

    workers: int
    image_seconds: float
    text_seconds: float
    span_seconds: float
    driver_seconds: float
    lost_after_seconds: float
    new_after_seconds: float
    stale_seconds: float = 60.0


@dataclass(frozen=True)
class Outcome:
    """What came of a run.

    Attributes:
        hours: until the last commit.
        busy: share of all workers' time that went into chunks which were committed.
        losses: workers.
        again: chunks that were begun by a worker that was lost.
        driver: share of the driver's time that went into handing out.
    """

    hours: float
    busy: float
    losses: int
    again: int
    driver: float


def simulate(fleet: Fleet, image_chunks: int, text_chunks: int, seed: int = 0) -> Outcome:
    """Run a fleet over all chunks of a cache."""
    rng = random.Random(seed)
    handout = Handout(
        [ChunkRef("image", 0, number) for number in range(image_chunks)]
        + [ChunkRef("text", 0, number) for number in range(text_chunks)],
        tries=10**9,
    )
    cost = {"image": fleet.image_seconds, "text": fleet.text_seconds}
    claimed: dict[ChunkRef, float] = {}  # by a lost worker, until then
    # when something happens, worker, its span, when that would end, when the worker is lost
    events: list[tuple[float, int, list[ChunkRef], float, float]] = []
    idle: list[tuple[int, float]] = []
    driver_free = driver_busy = useful = now = 0.0
    losses = again = 0

    def give(at: float, worker: int, dies: float) -> None:
        nonlocal driver_free, driver_busy
        span = handout.take(fleet.workers)
        if not span:
            idle.append((worker, dies))
            return
        driver_free = max(driver_free, at) + fleet.driver_seconds
        driver_busy += fleet.driver_seconds
        begin = driver_free
        for ref in span:
            begin = max(begin, claimed.pop(ref, 0.0))
        end = begin + fleet.span_seconds + sum(cost[ref.tower] for ref in span)
        heapq.heappush(events, (min(end, dies), worker, span, end, dies))

    for number in range(fleet.workers):
        give(fleet.new_after_seconds, number, fleet.new_after_seconds + rng.expovariate(1 / fleet.lost_after_seconds))
    while handout.left:
        now, worker, span, end, dies = heapq.heappop(events)
        if not span:  # a new worker
            give(now, worker, dies)
            continue
        if dies < end:
            losses += 1
            spent = [cost[ref.tower] for ref in span]
            left = len(span)
            began = end - sum(spent) - fleet.span_seconds
            for seconds in spent:
                if began + seconds > dies:
                    break
                began, left, useful = began + seconds, left - 1, useful + seconds
            handout.done(span[: len(span) - left])
            lost = span[len(span) - left :]
            again += min(3, len(lost))  # in flight at most
            claimed.update(dict.fromkeys(lost, dies + fleet.stale_seconds))
            handout.give_back(lost, None)
            back = dies + fleet.new_after_seconds
            dies = back + rng.expovariate(1 / fleet.lost_after_seconds)
            heapq.heappush(events, (back, worker, [], back, dies))
        else:
            useful += sum(cost[ref.tower] for ref in span)
            handout.done(span)
            give(end, worker, dies)
        while idle and handout.waiting:
            give(now, *idle.pop())
    return Outcome(now / 3600, useful / (fleet.workers * now), losses, again, driver_busy / now)
