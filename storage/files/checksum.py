"""CRC-32C of the objects of a cache, other threads going on meanwhile.

google-crc32c keeps Python's lock while it sums: threads that prove chunks would do so one after the other, and hold up
the one that gathers rows. The C function below it is the same; called by ``ctypes`` it lets go of the lock.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import google_crc32c
import numpy as np
from numpy.typing import NDArray

__all__ = ["crc32c"]


def crc32c(data: bytes | NDArray[Any], before: int = 0) -> int:
    """CRC-32C (RFC 3720) of bytes, or of those of a contiguous array of any shape and dtype; nothing is copied.

    Args:
        before: the sum of what lies before them.
    """
    if not isinstance(data, bytes) and not data.flags.c_contiguous:
        raise ValueError(f"array of shape {data.shape} is not contiguous")
    return _extend(before, data)


def _by_package(before: int, data: bytes | NDArray[Any]) -> int:
    octets = data if isinstance(data, bytes) else data.reshape(-1).view(np.uint8)
    return int(google_crc32c.extend(before, octets))


def _by_library() -> Callable[[int, bytes | NDArray[Any]], int] | None:
    """The function of the shared library that the package brings; not everywhere can it be found."""
    try:
        from google_crc32c import _crc32c

        # symbols are looked for in what the extension was linked with, too
        extend = ctypes.CDLL(_crc32c.__file__).crc32c_extend
    except (ImportError, OSError, AttributeError):
        return None
    extend.restype = ctypes.c_uint32
    extend.argtypes = [ctypes.c_uint32, ctypes.c_void_p, ctypes.c_size_t]

    def sum_of(before: int, data: bytes | NDArray[Any]) -> int:
        if isinstance(data, bytes):
            return int(extend(before, data, len(data)))
        return int(extend(before, data.ctypes.data, data.nbytes))

    # a function of this name that means something else is not used
    return sum_of if sum_of(0, b"123456789") == 0xE3069283 else None


_extend = _by_library() or _by_package
