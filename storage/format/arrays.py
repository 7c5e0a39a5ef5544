"""The Zarr side of a cache: array metadata made by zarr-python, chunk objects encoded and decoded here.

A chunk object is encoded as by zarr's ``bytes`` (little endian) and ``crc32c`` codecs: the row-major bytes of the
whole chunk, the last one padded, and four bytes of checksum. In a compressed cache zarr's ``blosc`` comes between them,
and the checksum is of the compressed bytes. Encoding here makes each write atomic on every kind of
storage. It also checks each read against the commit record: a chunk swapped with its neighbour has a valid checksum
of its own. A test checks that zarr-python reads the same values.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from teacher_cache.storage.errors import CacheCorruptError
from teacher_cache.storage.files.checksum import crc32c
from teacher_cache.storage.format.commits import ObjectDigest
from teacher_cache.storage.format.int8 import NO_EMBEDDING
from teacher_cache.storage.format.layout import ARRAYS, CRC_BYTES, SCALE, VIEW_FIELDS, Tower, chunk_shape, stored_arrays
from teacher_cache.storage.format.row_rules import has_nan

if TYPE_CHECKING:
    from teacher_cache.storage.format.layout import Layout

# crc32c of any message followed by its own crc32c, little endian: one pass over the object without a copy
_CRC_RESIDUE = 0x48674BC7

_DIMENSIONS: dict[tuple[str, str], tuple[str, ...]] = {
    ("image", "embedding"): ("image", "view", "dim"),
    ("image", "norm"): ("image", "view"),
    ("image", "view"): ("image", "view", "crop"),
    ("image", SCALE): ("chunk", "view", "dim"),
    ("text", "embedding"): ("caption", "dim"),
    ("text", "norm"): ("caption",),
    ("text", SCALE): ("chunk", "dim"),
}


def array_dtype(tower: Tower, name: str) -> np.dtype[Any]:
    """Return the dtype of an array as encoders produce it."""
    return np.dtype(ARRAYS[tower][name])


def given_dtype(layout: Layout, tower: Tower, name: str) -> np.dtype[Any]:
    """Return the dtype of an array as readers return it: the stored one, or float32 for int8 embeddings."""
    stored = stored_dtype(layout, tower, name)
    return np.dtype("<f4") if stored == np.int8 else stored


def stored_dtype(layout: Layout, tower: Tower, name: str) -> np.dtype[Any]:
    """Return the dtype of an array on disk."""
    return np.dtype(stored_arrays(layout, tower)[name])


def stored_form(layout: Layout, tower: Tower, name: str) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """Return shape and dtype of one chunk of an array on disk."""
    return chunk_shape(layout, tower, name), stored_dtype(layout, tower, name)


def _fill(dtype: np.dtype[Any]) -> float | int:
    """Return the fill value of an array, which is never a valid value."""
    return NO_EMBEDDING if dtype.kind == "i" else np.nan


def zarr_metadata(layout: Layout) -> dict[str, bytes]:
    """Return the ``zarr.json`` files of ``targets.zarr`` as zarr-python writes them, by key in the cache."""
    import zarr
    from zarr.codecs import BloscCodec, BytesCodec, Crc32cCodec
    from zarr.storage import MemoryStore

    written: dict[str, Any] = {}
    root = zarr.create_group(MemoryStore(written), zarr_format=3)
    towers: tuple[Tower, ...] = ("image", "text")
    for tower in towers:
        group = root.create_group(tower)
        for name, dtype in stored_arrays(layout, tower).items():
            chunk = chunk_shape(layout, tower, name)
            views = (layout.views,) if tower == "image" else ()
            rows = layout.chunks(tower) if name == SCALE else layout.rows(tower)
            blosc = BloscCodec(**_BLOSC, shuffle=_SHUFFLE, typesize=np.dtype(dtype).itemsize)
            group.create_array(
                name,
                shape=(rows, *views, *chunk[1:]),
                chunks=(chunk[0], *(1,) * len(views), *chunk[1:]),
                dtype=dtype,
                fill_value=_fill(np.dtype(dtype)),  # zarr returns it for rows never written; 0 would train quietly
                serializer=BytesCodec(endian="little"),
                compressors=[Crc32cCodec()] if layout.compressor is None else [blosc, Crc32cCodec()],
                dimension_names=_DIMENSIONS[tower, name],
                attributes={"fields": list(VIEW_FIELDS)} if name == "view" else None,
            )

    return {f"targets.zarr/{key}": buffer.to_bytes() for key, buffer in sorted(written.items())}


def _blosc(dtype: np.dtype[Any]) -> Any:
    """Return zarr's codec without its asynchronous interface."""
    from numcodecs import blosc  # only where a cache is compressed

    blosc.use_threads = False  # as zarr does: threads store the blocks in the order in which they finish
    return blosc.Blosc(**_BLOSC, shuffle=getattr(blosc, _SHUFFLE.upper()), typesize=dtype.itemsize)


def encode_object(
    values: NDArray[Any], shape: tuple[int, ...], dtype: np.dtype[Any], compressor: str | None = None
) -> tuple[bytes, ObjectDigest]:
    """Return one chunk object and its digests.

    Args:
        values: rows of the chunk, at most ``shape[0]``. A short chunk is padded with the fill value, NaN or -128.
        shape: shape of the whole chunk.
        dtype: stored dtype.
        compressor: ``Layout.compressor``.

    Raises:
        ValueError: the rows have another shape or dtype than the array. Nothing is cast silently.
    """
    if values.dtype != dtype or values.shape[1:] != shape[1:] or len(values) > shape[0]:
        raise ValueError(f"chunk is {values.shape} {values.dtype}, at most {shape} {dtype} wanted")
    if len(values) < shape[0]:
        padded = np.full(shape, _fill(dtype), dtype)
        padded[: len(values)] = values
        values = padded
    body = np.ascontiguousarray(values).tobytes()
    if compressor is not None:
        body = bytes(_blosc(dtype).encode(body))
    data = body + crc32c(body).to_bytes(CRC_BYTES, "little")
    return data, object_digest(data)


def object_digest(data: bytes) -> ObjectDigest:
    """Return the digests of a chunk object. The checksum is the one in its last four bytes, which is not proven."""
    crc = int.from_bytes(data[-CRC_BYTES:], "little")
    return ObjectDigest(nbytes=len(data), crc32c=crc, sha256=hashlib.sha256(data).hexdigest())


def decode_object(
    data: bytes | memoryview,
    wanted: ObjectDigest,
    shape: tuple[int, ...],
    dtype: np.dtype[Any],
    where: str,
    compressor: str | None = None,
) -> NDArray[Any]:
    """Return the rows of a chunk object, with padding: read-only, and a view of ``data`` unless it is compressed.

    Args:
        compressor: ``Layout.compressor``.

    Raises:
        CacheCorruptError: the bytes are not those that were committed (cut short, flipped, another chunk's), or they
            do not decompress to such a chunk.
    """
    size = int(np.prod(shape)) * dtype.itemsize
    end = size if compressor is None else wanted.nbytes - CRC_BYTES
    if len(data) != wanted.nbytes or len(data) != end + CRC_BYTES:
        raise CacheCorruptError(f"{where}: {len(data)} bytes, {wanted.nbytes} were committed. {_REMEDY}")
    octets = np.frombuffer(data, np.uint8)
    if crc32c(octets) != _CRC_RESIDUE or int.from_bytes(data[end:], "little") != wanted.crc32c:
        prove_body(octets[:end], bytes(data[end:]), wanted, where)
    body = data if compressor is None else _decompressed(octets[:end], size, dtype, where)
    return np.frombuffer(body, dtype, count=size // dtype.itemsize).reshape(shape)


def _decompressed(stored: NDArray[np.uint8], size: int, dtype: np.dtype[Any], where: str) -> bytes:
    header = bytes(stored[:16])
    sizes = [int.from_bytes(header[at : at + 4], "little") for at in (4, 12)]
    if sizes != [size, len(stored)]:  # numcodecs trusts the header, and would read behind the end
        raise CacheCorruptError(
            f"{where}: does not decompress: {sizes[1]} bytes to {sizes[0]} by its header, {len(stored)} to {size} "
            f"expected. {_REMEDY}"
        )
    try:
        body: bytes = _blosc(dtype).decode(stored)
    except RuntimeError as error:
        raise CacheCorruptError(f"{where}: does not decompress: {error}. {_REMEDY}") from error
    return body


def prove_body(body: NDArray[Any], stored: bytes, wanted: ObjectDigest, where: str, look_for_nan: bool = False) -> bool:
    """Prove the array bytes of a chunk object, and the checksum behind them, against the commit.

    Args:
        body: contiguous array of any shape, not copied.
        stored: last four bytes of the object.
        look_for_nan: whether to look for NaN, or for -128 in int8.

    Returns:
        Whether a value is NaN, or -128 in int8, if ``look_for_nan``. The padding of a short chunk counts.

    Raises:
        CacheCorruptError: these are not the bytes that were committed.
    """
    values, computed, has = body.reshape(-1), 0, False
    step = _PROVEN_AT_ONCE // body.dtype.itemsize
    for start in range(0, len(values), step):
        block = values[start : start + step]
        computed = crc32c(block, computed)
        has = has or (look_for_nan and has_nan(block))
    beside = int.from_bytes(stored, "little")
    if len(stored) != CRC_BYTES or not computed == beside == wanted.crc32c:
        raise CacheCorruptError(
            f"{where}: checksum {computed:08x}, {beside:08x} stored beside it, {wanted.crc32c:08x} committed. {_REMEDY}"
        )
    return has


# one setting for all caches: a chunk that is encoded again gets the same bytes. Blocks of 1 MiB save half as much again
# as the default of 32 KiB; higher levels save no more (benchmarks/compression.md)
_BLOSC: dict[str, Any] = {"cname": "zstd", "clevel": 1, "blocksize": 1 << 20}
_SHUFFLE: Final = "shuffle"  # of bytes: bitshuffle spreads what can be saved, sign and exponent, over eight planes
_PROVEN_AT_ONCE = 1 << 20  # bytes: a block that stays in the CPU cache for checksum and NaN
_REMEDY = "Run teacher-cache verify to list all damage, and teacher-cache repair CACHE to encode those chunks anew."
