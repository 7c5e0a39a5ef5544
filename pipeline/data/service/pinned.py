"""Memory that a GPU copies while it works and the host goes on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from teacher_cache.pipeline.data.service.slots import Pin


def pinned_for(device: torch.device) -> Pin | None:
    """Return what locks memory for a GPU's copies. None: a CPU.

    What unlocks it waits for the device first. The lock raises RuntimeError where the memory cannot be locked.
    """
    if device.type != "cuda":
        return None

    def pin(memory: NDArray[np.uint8]) -> Callable[[], None]:
        runtime: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]
        with torch.cuda.device(device):
            torch.cuda.check_error(runtime.cudaHostRegister(memory.ctypes.data, memory.nbytes, 0))

        def unpin() -> None:
            torch.cuda.synchronize(device)
            runtime.cudaHostUnregister(memory.ctypes.data)

        return unpin

    return pin


class Copied(Protocol):
    """Point in a device's work, as ``torch.cuda.Event`` has it."""

    def query(self) -> bool:
        """Return whether the work before it is done."""
        ...

    def synchronize(self) -> None:
        """Wait for that work."""
        ...


class CopyStream:
    """Copies to one device, beside its other work. On a CPU nothing is copied.

    A GPU copies by an engine of its own: the next batch arrives while the model works on this one. What is queued after
    a copy waits for it, the host does not.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream: torch.cuda.Stream | None = None
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def copied(self, pinned: Tensor) -> tuple[Tensor, Copied | None]:
        """Return a tensor on the device, and when ``pinned`` may be written again. None: at once, on a CPU."""
        if self._stream is None:
            return pinned.to(self._device), None
        work = torch.cuda.current_stream(self._device)
        with torch.cuda.stream(self._stream):
            moved = pinned.to(self._device, non_blocking=True)
            done = self._stream.record_event()
        work.wait_event(done)
        moved.record_stream(work)  # its memory is not given to the next copy before the work has read it
        return moved, done
