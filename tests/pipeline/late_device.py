"""A device that works late: its copies and its computing run in random legal order, long after they were asked for."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable
from typing import Any

from torch import Tensor

from teacher_cache.pipeline.data.service.slots import Slot, Slots


class Done:
    """Point behind a piece of the device's work, as ``torch.cuda.Event``."""

    def __init__(self, device: LateDevice) -> None:
        self._device, self.reached = device, False

    def query(self) -> bool:
        self._device.go_on()
        return self.reached

    def synchronize(self) -> None:
        while not self.reached:
            self._device.step()


class LateDevice:
    """Two streams, copies and work, each in its own order; work may wait for a copy. Nothing runs when it is queued."""

    def __init__(self, seed: int) -> None:
        self._pick = random.Random(seed)
        self._copies: deque[tuple[Callable[[], object], Done]] = deque()
        self._work: deque[tuple[Callable[[], object], Done, Done]] = deque()
        self.most_waiting = 0

    def copy(self, run: Callable[[], object]) -> Done:
        done = Done(self)
        self._copies.append((run, done))
        self.go_on()
        return done

    def work(self, run: Callable[[], object], after: Done) -> Done:
        done = Done(self)
        self._work.append((run, done, after))
        self.most_waiting = max(self.most_waiting, len(self._work))
        self.go_on()
        return done

    def go_on(self) -> None:
        """Run what the device happens to have got to by now: often nothing."""
        for _ in range(self._pick.choice([0, 0, 0, 1, 2])):
            self.step()

    def step(self) -> None:
        """Run one piece that may run."""
        may = [self._copies] * bool(self._copies) + [self._work] * bool(self._work and self._work[0][2].reached)
        if may:
            queue: Any = self._pick.choice(may)
            run, done, *_ = queue.popleft()
            run()
            done.reached = True

    def copied(self, pinned: Tensor) -> tuple[Tensor, Done]:
        """As ``CopyStream.copied``: the bytes arrive when the copy runs."""
        moved = pinned.new_zeros(pinned.shape)
        return moved, self.copy(lambda: moved.copy_(pinned))


def poison(self: Slots, slot: Slot) -> None:
    """In place of ``Slots.give_back``: who reads the slot from now on reads garbage."""
    self.array(slot, (slot.nbytes,))[:] = 0xAA
    give_back(self, slot)


give_back = Slots.give_back
