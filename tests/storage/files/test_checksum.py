"""CRC-32C of bytes and arrays, against the known values and the library that zarr uses."""

from __future__ import annotations

import google_crc32c
import numpy as np
import pytest

from teacher_cache.storage.files.checksum import crc32c

# RFC 3720, B.4
VECTORS = [
    (bytes(32), 0x8A9136AA),
    (b"\xff" * 32, 0x62A8AB43),
    (bytes(range(32)), 0x46DD794E),
    (bytes(range(31, -1, -1)), 0x113FDB5C),
    (b"", 0),
]


@pytest.mark.parametrize(("message", "expected"), VECTORS)
def test_known_values(message: bytes, expected: int) -> None:
    assert crc32c(message) == expected
    assert crc32c(np.frombuffer(message, np.uint8)) == expected


def test_parts_of_any_dtype_and_shape_give_the_whole() -> None:
    values = np.random.default_rng(0).standard_normal((7, 3, 4)).astype(np.float16)
    expected = google_crc32c.value(values.tobytes())
    assert crc32c(values) == expected
    assert crc32c(values[5:], crc32c(values[:5])) == expected
    assert crc32c(values[5:].tobytes(), crc32c(values[:5].tobytes())) == expected


def test_what_is_not_contiguous_is_refused() -> None:
    with pytest.raises(ValueError, match=r"\(4, 2\) is not contiguous"):
        crc32c(np.zeros((4, 4))[:, :2])
