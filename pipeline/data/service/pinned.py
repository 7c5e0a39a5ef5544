"""Memory that a GPU reads while the host goes on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray


def pin_memory(memory: NDArray[np.uint8]) -> Callable[[], None]:
    """Lock memory for a GPU's copies, and return what unlocks it.

    Raises:
        torch.AcceleratorError: the memory cannot be locked.
    """
    runtime: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]
    torch.cuda.check_error(runtime.cudaHostRegister(memory.ctypes.data, memory.nbytes, 0))
    return lambda: torch.cuda.check_error(runtime.cudaHostUnregister(memory.ctypes.data))
