"""CRC-32C of the objects of a cache, computed without the GIL."""

from __future__ import annotations

from typing import Any

import numpy as np
from crc32c import crc32c as _extended
from numpy.typing import NDArray


def crc32c(data: bytes | NDArray[Any], before: int = 0) -> int:
    """Return the CRC-32C (RFC 3720) of bytes, or of a contiguous array of any shape and dtype. Nothing is copied.

    Args:
        before: checksum of the preceding bytes.
    """
    if isinstance(data, bytes):
        return int(_extended(data, before))
    if not data.flags.c_contiguous:
        raise ValueError(f"array of shape {data.shape} is not contiguous")
    return int(_extended(data.reshape(-1).view(np.uint8).data, before))
