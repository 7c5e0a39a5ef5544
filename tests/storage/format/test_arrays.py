"""Chunk objects are what zarr-python itself writes, and no other bytes pass for them."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numcodecs.blosc
import numpy as np
import pytest
import zarr

from teacher_cache.storage.errors import CacheCorruptError
from teacher_cache.storage.files.checksum import crc32c
from teacher_cache.storage.format.arrays import decode_object, encode_object, zarr_metadata
from teacher_cache.storage.format.commits import ObjectDigest
from teacher_cache.storage.format.layout import Layout
from tests.conftest import known_row

LAYOUT = Layout(embed_dim=8, image_rows=10, text_rows=25, image_chunk_rows=4, text_chunk_rows=4, batch_rows=2)
SHAPE, DTYPE = (4, 8), np.dtype("<f2")
LONG = (64, 8)  # Blosc leaves less than 128 bytes as they are


@pytest.mark.parametrize("compressor", [None, "blosc"])
@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_objects_equal_those_that_zarr_writes(tmp_path: Path, dtype: str, compressor: str | None) -> None:
    changed = {"embedding_dtype": None if dtype == "float16" else dtype, "compressor": compressor}
    layout = LAYOUT.model_copy(update=changed)
    for key, data in zarr_metadata(layout).items():
        (tmp_path / key).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / key).write_bytes(data)
    rows = (100 * np.stack([known_row("image", row) for row in range(10)])).astype(dtype)
    array = zarr.open_array(tmp_path / "targets.zarr" / "image" / "embedding", mode="r+")
    array[:, 0, :] = rows
    for chunk in range(3):  # the last one is padded
        written = (tmp_path / f"targets.zarr/image/embedding/c/{chunk}/0/0").read_bytes()
        part = rows[4 * chunk : 4 * chunk + 4]
        data, digest = encode_object(part, SHAPE, rows.dtype, compressor)
        assert data == written
        decoded = decode_object(data, digest, SHAPE, rows.dtype, "here", compressor)
        assert not decoded.flags.writeable
        np.testing.assert_array_equal(decoded[: len(part)], part)


def test_the_metadata_of_compressed_arrays_say_how() -> None:
    metadata = zarr_metadata(LAYOUT.model_copy(update={"compressor": "blosc"}))
    sizes = {"embedding": 2, "norm": 4, "view": 4}
    for name, size in sizes.items():
        codecs = json.loads(metadata[f"targets.zarr/image/{name}/zarr.json"])["codecs"]
        blosc = {"typesize": size, "cname": "zstd", "clevel": 1, "shuffle": "shuffle", "blocksize": 1 << 20}
        assert [codec["name"] for codec in codecs] == ["bytes", "blosc", "crc32c"]
        assert codecs[1]["configuration"] == blosc


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


@pytest.mark.parametrize("compressor", [None, "blosc"])
def test_every_flipped_bit_is_found(compressor: str | None) -> None:
    shape = SHAPE if compressor is None else LONG
    data, digest = encode_object(np.ones(shape, DTYPE), shape, DTYPE, compressor)
    assert compressor is None or len(data) < 100
    for bit in range(8 * len(data)):
        damaged = bytearray(data)
        damaged[bit // 8] ^= 1 << bit % 8
        with pytest.raises(CacheCorruptError, match=r"here: checksum"):
            decode_object(bytes(damaged), digest, shape, DTYPE, "here", compressor)


def test_a_cut_object_and_another_chunks_object_are_found() -> None:
    data, digest = encode_object(np.ones(SHAPE, DTYPE), SHAPE, DTYPE)
    other, _ = encode_object(np.zeros(SHAPE, DTYPE), SHAPE, DTYPE)
    with pytest.raises(CacheCorruptError, match=r"here: 67 bytes, 68 were committed"):
        decode_object(data[:-1], digest, SHAPE, DTYPE, "here")
    with pytest.raises(CacheCorruptError, match=r"here: checksum"):
        decode_object(other, digest, SHAPE, DTYPE, "here")


def test_compressed_bytes_are_the_same_in_every_run() -> None:
    """Blosc's threads would store the blocks in the order in which they finish."""
    values = np.random.default_rng(0).standard_normal((4096, 1024)).astype(np.float16)
    numcodecs.blosc.use_threads = None
    objects = {encode_object(values, values.shape, DTYPE, "blosc")[1].sha256 for _ in range(5)}
    assert len(objects) == 1


def _committed(body: bytes) -> tuple[bytes, ObjectDigest]:
    """An object under the right checksum, as a wrong program would write it."""
    checksum = crc32c(body)
    data = body + checksum.to_bytes(4, "little")
    return data, ObjectDigest(nbytes=len(data), crc32c=checksum, sha256=hashlib.sha256(data).hexdigest())


def test_what_does_not_decompress_to_a_chunk_is_corrupt() -> None:
    (whole, _), (other, _) = (encode_object(np.ones((rows, 8), DTYPE), (rows, 8), DTYPE, "blosc") for rows in (64, 63))
    for body, what in (
        (b"", "does not decompress"),
        (b"no blosc", "does not decompress"),
        (whole[:-5], "does not decompress"),
        (whole[:24] + b"\xff" * (len(whole) - 28), "does not decompress: error during blosc"),
        (other[:-4], rf"does not decompress: {len(other) - 4} bytes to 1008 by its header, \d+ to 1024 expected"),
    ):
        with pytest.raises(CacheCorruptError, match=f"here: {what}.*verify to list all damage, and .*repair"):
            decode_object(*_committed(body), LONG, DTYPE, "here", "blosc")


@pytest.mark.parametrize("values", [np.ones((4, 8), np.float32), np.ones((4, 7), DTYPE), np.ones((5, 8), DTYPE)])
def test_nothing_is_cast_or_reshaped_in_silence(values: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"at most \(4, 8\) float16 wanted"):
        encode_object(values, SHAPE, DTYPE)
