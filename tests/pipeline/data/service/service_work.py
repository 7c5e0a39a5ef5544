"""What the workers of test_service.py do, and a process that is killed with its workers."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from teacher_cache.pipeline.data.service.service import DecodeProcesses
from teacher_cache.pipeline.data.service.slots import Slot, Slots

ROW = 8


class Item(NamedTuple):
    """A number to write into a row of a slot. ``does`` is what happens before."""

    number: int
    slot: Slot
    at: int
    does: str = ""


class Write:
    """Write each item's number, and return its square. Deaths leave a line in ``log``."""

    modules: tuple[str, ...] = ()

    def __init__(self, log: Path) -> None:
        self.log = log

    def named(self, item: Item) -> str:
        return f"number {item.number}"

    def __call__(self, items: Sequence[Item], slots: Slots) -> list[Any]:
        return [self._one(item, slots) for item in items]

    def _one(self, item: Item, slots: Slots) -> Any:
        if item.does == "raise":
            raise FileNotFoundError(2, "no such picture", str(item.number))
        if item.does == "modules":
            return [name for name in ("torch", "zarr", "prefect") if name in sys.modules]
        if item.does == "blocks":
            return Image.core.get_blocks_max()
        if item.does == "sleep":
            time.sleep(0.002)
        if item.does == "poison" or (item.does == "poison once" and not self.log.exists()):
            self.log.open("a").write(f"{item.number}\n")
            os.kill(os.getpid(), signal.SIGSEGV)
        if item.does == "hang":
            signal.pause()
        slots.array(item.slot, (ROW,), offset=item.at * ROW)[:] = item.number % 251
        return item.number**2


class CannotStart(Write):
    """It cannot be rebuilt in a worker."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.getcwdb, (1,)


def main() -> None:
    """Print the workers' ids, and decode until somebody kills this process."""
    slots = Slots()
    with DecodeProcesses(Write(Path("unused")), slots, 2) as service:
        sys.stdout.write(" ".join(map(str, service.pids)) + "\n")
        sys.stdout.flush()
        slot = slots.take(64 * ROW)
        while True:
            service.submit([Item(number, slot, number, "sleep") for number in range(64)]).result()
