"""CRC-32C by the shared library and by the package's own call are one thing."""

from __future__ import annotations

import sys

import google_crc32c
import numpy as np
import pytest

from teacher_cache.storage.files import checksum
from teacher_cache.storage.files.checksum import crc32c

# RFC 3720, B.4
VECTORS = [
    (bytes(32), 0x8A9136AA),
    (b"\xff" * 32, 0x62A8AB43),
    (bytes(range(32)), 0x46DD794E),
    (bytes(range(31, -1, -1)), 0x113FDB5C),
    (b"", 0),
]


@pytest.fixture(params=["as found", "by the package"])
def _way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "by the package":
        monkeypatch.setattr(checksum, "_extend", checksum._by_package)


@pytest.mark.usefixtures("_way")
@pytest.mark.parametrize(("message", "wanted"), VECTORS)
def test_known_values(message: bytes, wanted: int) -> None:
    assert crc32c(message) == wanted
    assert crc32c(np.frombuffer(message, np.uint8)) == wanted


@pytest.mark.usefixtures("_way")
def test_parts_of_any_dtype_and_shape_give_the_whole() -> None:
    values = np.random.default_rng(0).standard_normal((7, 3, 4)).astype(np.float16)
    wanted = google_crc32c.value(values.tobytes())
    assert crc32c(values) == wanted
    assert (
        crc32c(values[5:], crc32c(values[:5])) == crc32c(values[5:].tobytes(), crc32c(values[:5].tobytes())) == wanted
    )


def test_what_is_not_contiguous_is_refused() -> None:
    with pytest.raises(ValueError, match=r"\(4, 2\) is not contiguous"):
        crc32c(np.zeros((4, 4))[:, :2])


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the library may not be found")
def test_the_call_that_lets_other_threads_go_on_is_the_one_in_use() -> None:
    assert checksum._extend is not checksum._by_package
