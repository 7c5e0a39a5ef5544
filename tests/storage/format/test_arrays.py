"""Chunk objects are what zarr-python itself writes, and no other bytes pass for them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import zarr

from teacher_cache.storage.errors import CacheCorruptError
from teacher_cache.storage.format.arrays import decode_object, encode_object, zarr_metadata
from teacher_cache.storage.format.layout import Layout
from tests.conftest import known_row

LAYOUT = Layout(embed_dim=8, image_rows=10, text_rows=25, image_chunk_rows=4, text_chunk_rows=4, batch_rows=2)
SHAPE, DTYPE = (4, 8), np.dtype("<f2")


@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_objects_equal_those_that_zarr_writes(tmp_path: Path, dtype: str) -> None:
    layout = LAYOUT.model_copy(update={"embedding_dtype": None if dtype == "float16" else dtype})
    for key, data in zarr_metadata(layout).items():
        (tmp_path / key).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / key).write_bytes(data)
    rows = (100 * np.stack([known_row("image", row) for row in range(10)])).astype(dtype)
    array = zarr.open_array(tmp_path / "targets.zarr" / "image" / "embedding", mode="r+")
    array[:, 0, :] = rows
    for chunk in range(3):  # the last one is padded
        written = (tmp_path / f"targets.zarr/image/embedding/c/{chunk}/0/0").read_bytes()
        assert encode_object(rows[4 * chunk : 4 * chunk + 4], SHAPE, rows.dtype)[0] == written


def test_zarr_reads_what_the_writer_wrote(known_cache: Path) -> None:
    group = zarr.open_group(known_cache / "targets.zarr", mode="r")
    expected = np.stack([known_row("text", row) for row in range(25)])
    np.testing.assert_array_equal(group["text/embedding"][:], expected)
    np.testing.assert_array_equal(group["image/norm"][:, 0], np.arange(10) + 1)
    assert group["image/embedding"].shape == (10, 1, 8)
    assert group["image/embedding"].metadata.dimension_names == ("image", "view", "dim")


def test_decode_gives_the_rows_and_the_padding() -> None:
    rows = np.stack([known_row("image", row) for row in range(3)])
    data, digest = encode_object(rows, SHAPE, DTYPE)
    values = decode_object(data, digest, SHAPE, DTYPE, "here")
    np.testing.assert_array_equal(values[:3], rows)
    assert np.isnan(values[3]).all()


def test_every_flipped_bit_is_found() -> None:
    data, digest = encode_object(np.ones(SHAPE, DTYPE), SHAPE, DTYPE)
    for bit in range(8 * len(data)):
        damaged = bytearray(data)
        damaged[bit // 8] ^= 1 << bit % 8
        with pytest.raises(CacheCorruptError, match=r"here: checksum"):
            decode_object(bytes(damaged), digest, SHAPE, DTYPE, "here")


def test_a_cut_object_and_another_chunks_object_are_found() -> None:
    data, digest = encode_object(np.ones(SHAPE, DTYPE), SHAPE, DTYPE)
    other, _ = encode_object(np.zeros(SHAPE, DTYPE), SHAPE, DTYPE)
    with pytest.raises(CacheCorruptError, match=r"here: 67 bytes, 68 were committed"):
        decode_object(data[:-1], digest, SHAPE, DTYPE, "here")
    with pytest.raises(CacheCorruptError, match=r"here: checksum"):
        decode_object(other, digest, SHAPE, DTYPE, "here")


@pytest.mark.parametrize("values", [np.ones((4, 8), np.float32), np.ones((4, 7), DTYPE), np.ones((5, 8), DTYPE)])
def test_nothing_is_cast_or_reshaped_in_silence(values: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"at most \(4, 8\) float16 wanted"):
        encode_object(values, SHAPE, DTYPE)
