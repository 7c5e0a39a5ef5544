"""What a stream leaves to the next one: mapped files, and memory of batches that are gone."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from teacher_cache.storage.errors import CacheCorruptError
from teacher_cache.storage.read.reader import EmbeddingReader
from teacher_cache.storage.read.stream import Prove
from teacher_cache.storage.read.stream_chunks import OutputArrays
from tests.storage.read.test_stream import CHUNK_ROWS, CHUNKS, IMAGES, epoch, fill_known_cache, mapped, remote

__all__ = ["mapped", "remote"]


def test_streams_of_one_array_side_by_side(mapped: str) -> None:
    """Whichever ends last leaves its mapped chunks to the next one."""
    reader, other = EmbeddingReader(mapped), EmbeddingReader(mapped)
    for number in range(2):
        orders = [list(epoch(reader, number)), list(epoch(reader, number + 7))]
        for first, second, left, right in zip(*orders, *(reader.stream("image", each) for each in orders), strict=True):
            np.testing.assert_array_equal(left, other.take("image", first))
            np.testing.assert_array_equal(right, other.take("image", second))
    before = reader.objects_read
    list(reader.stream("image", epoch(reader, 0)))
    assert reader.objects_read == before


def test_a_stream_that_was_left_leaves_what_it_mapped(mapped: str) -> None:
    reader = EmbeddingReader(mapped)
    left = reader.stream("image", epoch(reader, 0), read_ahead_bytes=0)
    next(left)
    left.close()  # type: ignore[attr-defined]
    before = reader.objects_read
    list(reader.stream("image", epoch(reader, 0)))
    assert before > 0
    assert reader.objects_read == CHUNKS


def test_after_an_error_nothing_is_left_to_the_next_stream(mapped: str) -> None:
    reader = EmbeddingReader(mapped)
    with pytest.raises(IndexError):
        list(reader.stream("image", [np.arange(9), np.array([IMAGES])]))
    assert reader.chunks.mapped == {}


def test_of_a_store_nothing_stays_beside_what_the_reader_holds(remote: str) -> None:
    reader = EmbeddingReader(remote)
    list(reader.stream("image", epoch(reader, 0)))
    assert reader.chunks.mapped == {}


def test_chunks_that_no_stream_wants_any_more_make_room(mapped: str) -> None:
    """One half of the rows first, then the other one, with room for three chunks."""
    reader = EmbeddingReader(mapped, memory_bytes=3 * 4096)
    halves = [[rows] for rows in np.split(np.arange(IMAGES // 256 * 256), [4 * 256])]
    for half, reads in ((halves[0], 4), (halves[0], 1), (halves[1], 3), (halves[1], 3), (halves[1], 0)):
        before = reader.objects_read
        list(reader.stream("text", half))
        assert reader.objects_read - before == reads


def test_memory_is_used_again_when_nothing_uses_it() -> None:
    outputs = OutputArrays(np.dtype(np.float16))
    first = outputs.empty((2, 4))
    at = first.ctypes.data
    first[:] = 7
    for user in (first, first[1:], memoryview(first), np.from_dlpack(first), first.T.base):
        assert at not in {outputs.empty((2, 4)).ctypes.data for _ in range(9)}
        outputs = OutputArrays(np.dtype(np.float16))
        first = outputs.empty((2, 4))
        at, _ = first.ctypes.data, user
    first.flags.writeable = False
    del first, user
    again = outputs.empty((2, 4))
    assert (again.ctypes.data, again.dtype, again.flags.writeable) == (at, np.float16, True)
    assert outputs.empty((0, 4)).shape == (0, 4)


def test_what_is_left_of_a_batch_holds_its_memory(mapped: str) -> None:
    reader = EmbeddingReader(mapped)
    order = list(epoch(reader, 0))
    parts = [values[3:5].view(np.uint16) for values in reader.stream("image", order)]
    for rows, part in zip(order, parts, strict=True):
        np.testing.assert_array_equal(part, reader.take("image", rows)[3:5].view(np.uint16))


def put_another_in_its_place(location: str) -> None:
    path, other = (Path(location) / f"targets.zarr/text/embedding/c/{chunk}/0" for chunk in (1, 2))
    data = other.read_bytes()
    path.unlink()
    path.write_bytes(data)


def test_a_file_that_took_anothers_place_between_epochs(tmp_path: Path) -> None:
    location = fill_known_cache(str(tmp_path / "c"), CHUNK_ROWS)
    reader = EmbeddingReader(location, memory_bytes=1)
    order = [np.arange(0, IMAGES, 3)]
    list(reader.stream("text", order))
    put_another_in_its_place(location)
    with pytest.raises(CacheCorruptError, match=r"text/embedding/c/1/0: checksum"):
        list(reader.stream("text", order))


def test_a_file_that_was_mended_is_taken_instead_of_the_one_that_is_mapped(tmp_path: Path) -> None:
    location = fill_known_cache(str(tmp_path / "c"), CHUNK_ROWS)
    reader = EmbeddingReader(location)
    order = [np.arange(0, IMAGES, 3)]
    wanted = list(reader.stream("text", order))
    path = Path(location) / "targets.zarr/text/embedding/c/1/0"
    whole = path.read_bytes()
    with path.open("r+b") as file:  # in its place, as a disk does it
        file.write(b"\0\0\0")
    with pytest.raises(CacheCorruptError, match=r"text/embedding/c/1/0: checksum"):
        list(reader.stream("text", order, prove="every"))
    list(reader.stream("text", order[:1]))
    path.unlink()
    path.write_bytes(whole)
    np.testing.assert_array_equal(list(reader.stream("text", order, prove="every")), wanted)


def test_a_mapped_file_that_was_cut_short_between_epochs_is_an_error(tmp_path: Path) -> None:
    location = fill_known_cache(str(tmp_path / "c"), CHUNK_ROWS)
    reader = EmbeddingReader(location)
    order = [np.arange(0, IMAGES, 3)]
    list(reader.stream("text", order))
    os.truncate(Path(location) / "targets.zarr/text/embedding/c/1/0", 100)
    with pytest.raises(CacheCorruptError, match=r"text/embedding/c/1/0"):
        list(reader.stream("text", order))


@pytest.mark.parametrize("prove", ["first", "every"])
def test_a_file_that_stays_mapped_is_the_one_that_was_proven(tmp_path: Path, prove: Prove) -> None:
    location = fill_known_cache(str(tmp_path / "c"), CHUNK_ROWS)
    reader = EmbeddingReader(location)
    order = [np.arange(0, IMAGES, 3)]
    wanted = list(reader.stream("text", order))
    put_another_in_its_place(location)
    np.testing.assert_array_equal(list(reader.stream("text", order, prove=prove)), wanted)
