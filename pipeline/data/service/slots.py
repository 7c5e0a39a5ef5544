"""Slots of shared memory: one process writes pixels and tokens where another reads them, without a copy. No torch."""

from __future__ import annotations

import contextlib
import heapq
import mmap
import os
import threading
from collections import defaultdict
from collections.abc import Callable, Sequence
from multiprocessing.reduction import DupFd
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import DTypeLike, NDArray

from teacher_cache.storage.files.local import unnamed_file

Pin = Callable[[NDArray[np.uint8]], Callable[[], None]]


class Slot(NamedTuple):
    """Part of the shared file: where it begins, and its size in bytes."""

    start: int
    nbytes: int


class Slots:
    """Slots in an unnamed file, which worker processes share. Thread-safe.

    A slot takes memory from its first use on. The file is no part of ``/dev/shm``, whose size containers limit, and
    is gone with the last process that has it open. A slot is written by many and given back once, by the process that
    took it; its bytes stay as they are until then.

    Args:
        pin: makes a slot's memory readable by a GPU and returns what undoes it. It is called once per slot, in the
            process that takes slots.
    """

    def __init__(self, pin: Pin | None = None) -> None:
        self._file = unnamed_file("teacher-cache inputs")
        self._pin, self._pinned = pin, list[Callable[[], None]]()
        self._free: defaultdict[int, list[Slot]] = defaultdict(list)
        self._end = 0
        self._maps: dict[int, mmap.mmap] = {}
        self._lock = threading.Lock()

    def take(self, nbytes: int) -> Slot:
        """Return a free slot of at least this size. Its bytes are arbitrary."""
        size = -(-max(1, nbytes) // mmap.ALLOCATIONGRANULARITY) * mmap.ALLOCATIONGRANULARITY
        with self._lock:
            if self._free[size]:
                return heapq.heappop(self._free[size])
            slot = Slot(self._end, size)
            self._end += size
            os.ftruncate(self._file, self._end)
        if self._pin is not None:
            self._pinned.append(self._pin(self.array(slot, (size,))))
        return slot

    def give_back(self, slot: Slot) -> None:
        """Return a slot to the free ones. It may not be read or written any longer."""
        with self._lock:
            heapq.heappush(self._free[slot.nbytes], slot)

    def array(self, slot: Slot, shape: Sequence[int], dtype: DTypeLike = np.uint8, offset: int = 0) -> NDArray[Any]:
        """Return the memory of a slot, from byte ``offset`` on, as an array."""
        with self._lock:
            if slot.start not in self._maps:
                self._maps[slot.start] = mmap.mmap(self._file, slot.nbytes, offset=slot.start)
        values = np.frombuffer(self._maps[slot.start], dtype, int(np.prod(shape)), offset)
        return values.reshape(shape)

    def close(self) -> None:
        """Give the memory back, once no array of it is in use."""
        for unpin in self._pinned:
            with contextlib.suppress(Exception):  # a broken device: its own error is the one to tell
                unpin()
        self._pinned.clear()
        self._maps.clear()
        os.close(self._file)

    def __reduce__(self) -> tuple[Any, ...]:
        # a file can be handed to a process that is being started, and to no other
        return _attached, (DupFd(self._file),)


def _attached(file: Any) -> Slots:
    slots = Slots.__new__(Slots)
    slots._file = file.detach()
    slots._maps, slots._lock = {}, threading.Lock()
    return slots
