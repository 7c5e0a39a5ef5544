"""A stream gives what ``take`` gives, and reads each chunk once."""

from __future__ import annotations

import itertools
import os
import threading
import uuid
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest

from teacher_cache.storage.errors import CacheCorruptError, CacheUnreachableError
from teacher_cache.storage.files.local import LocalFiles
from teacher_cache.storage.format.commits import ChunkRef
from teacher_cache.storage.read.chunk_region import ChunkRegion
from teacher_cache.storage.read.reader import EmbeddingReader
from teacher_cache.storage.read.shuffle import batches, window_order
from teacher_cache.storage.read.stream import Prove
from tests.conftest import finish_known_cache, known_row, make_known_cache, plan_known_cache

IMAGES, CHUNK_ROWS, WINDOW = 2000, 256, 3  # chunks of 256 x 8 float16 are one page: their files are mapped
CHUNKS = 8


def fill_known_cache(
    location: str, chunk_rows: int, dtype: Literal["float16", "int8"] = "float16", **fields: Any
) -> str:
    plan_known_cache(location, IMAGES, IMAGES, chunk_rows, dtype=dtype, **fields)
    finish_known_cache(location, lost=[chunk_rows + 2])
    return location


@pytest.fixture(scope="module")
def mapped(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Chunk files of whole pages."""
    return fill_known_cache(str(tmp_path_factory.mktemp("mapped") / "c"), CHUNK_ROWS)


@pytest.fixture(scope="module")
def copied(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Chunk files that no page boundary ends."""
    return fill_known_cache(str(tmp_path_factory.mktemp("copied") / "c"), 250)


@pytest.fixture(scope="module")
def remote() -> str:
    return fill_known_cache(f"memory://{uuid.uuid4()}/a.cache", CHUNK_ROWS)


@pytest.fixture(params=["mapped", "copied", "remote"])
def location(request: pytest.FixtureRequest) -> str:
    found: str = request.getfixturevalue(request.param)
    return found


def epoch(reader: EmbeddingReader, number: int, size: int = 64) -> Iterator[np.ndarray]:
    order = window_order(reader.image_rows(), reader.manifest.layout.image_chunk_rows, WINDOW, 0, number)
    return batches(order, size)


@pytest.mark.parametrize("prove", ["first", "every"])
@pytest.mark.parametrize("array", ["embedding", "norm", "view"])
def test_a_stream_gives_what_take_gives(location: str, prove: Prove, array: str) -> None:
    reader, other = EmbeddingReader(location), EmbeddingReader(location)
    order = list(epoch(reader, 0))
    found = list(reader.stream("image", order, array=array, prove=prove))
    assert len(found) == len(order) == 31
    for rows, values in zip(order, found, strict=True):
        wanted = other.take("image", rows, array=array)
        assert (values.dtype, values.tobytes()) == (wanted.dtype, wanted.tobytes())


def test_any_order_and_any_sizes_of_batches(location: str) -> None:
    reader = EmbeddingReader(location)
    order = [np.array(rows, np.int64) for rows in ([5, 1999, 5], [], [0], [700] * 9000, list(range(1999, 999, -1)))]
    for rows, values in zip(order, reader.stream("text", order, read_ahead_bytes=1), strict=True):
        np.testing.assert_array_equal(values[:10], [known_row("text", row) for row in rows[:10]] or np.empty((0, 8)))
        assert values.shape == (len(rows), 8)


@pytest.mark.parametrize(("room", "again"), [(1, CHUNKS), (3 * 4096, CHUNKS - 3), (CHUNKS * 4096, 0)])
def test_an_epoch_reads_each_chunk_once(mapped: str, room: int, again: int) -> None:
    """And a later one those that the reader's memory has no room for."""
    reader = EmbeddingReader(mapped, memory_bytes=room)
    for number in range(3):
        for _ in reader.stream("image", epoch(reader, number)):
            pass
        assert reader.objects_read == CHUNKS + number * again
        assert reader.bytes_read == reader.objects_read * (4096 + 4)


def test_chunks_of_a_store_that_fit_in_memory_are_read_once_in_all(remote: str) -> None:
    reader = EmbeddingReader(remote)
    for number in range(2):
        for _ in reader.stream("image", epoch(reader, number)):
            pass
    assert reader.objects_read == CHUNKS


@pytest.mark.parametrize(("prove", "proofs"), [("first", 1), ("every", 2)])
def test_how_often_a_chunk_is_proven(mapped: str, prove: Prove, proofs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from teacher_cache.storage.read import chunks

    proven: Counter[str] = Counter()

    def counting(body: np.ndarray, stored: bytes, wanted: object, where: str, look_for_nan: bool) -> bool:
        proven[where] += 1
        return real(body, stored, wanted, where, look_for_nan)

    real = chunks.prove_body
    monkeypatch.setattr(chunks, "prove_body", counting)
    reader = EmbeddingReader(mapped)
    for number in range(2):
        for _ in reader.stream("image", epoch(reader, number), prove=prove):
            pass
    assert sorted(proven.values()) == [proofs] * CHUNKS


def test_a_row_is_copied_once(mapped: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the system's page cache to the batch: no chunk is read into memory or copied beside it."""
    reader = EmbeddingReader(mapped)
    order = list(epoch(reader, 0))
    gathered, take = [0], np.take

    def refuse(*_: object) -> None:
        raise AssertionError("copied")

    def counting(values: np.ndarray, *rest: object, **how: object) -> np.ndarray:
        out = take(values, *rest, **how)  # type: ignore[call-overload]
        gathered[0] += out.nbytes
        return out

    monkeypatch.setattr(LocalFiles, "read", refuse)
    monkeypatch.setattr(ChunkRegion, "fill", refuse)
    monkeypatch.setattr(np, "take", counting)
    rows = sum(len(values) for values in reader.stream("image", order))
    assert gathered[0] == rows * 8 * 2


def test_next_windows_chunks_are_there_before_they_are_needed(mapped: str) -> None:
    reader = EmbeddingReader(mapped)
    stream = reader.stream("image", epoch(reader, 0))
    next(stream)
    deadline = threading.Event()
    for _ in range(600):  # other threads load them, and nobody waits for them
        if reader.objects_read == CHUNKS:
            break
        deadline.wait(0.1)
    assert reader.objects_read == CHUNKS
    stream.close()  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("budget", "most"), [(0, 2 * WINDOW), (4096 * CHUNKS, CHUNKS), (2 * 4096, 4)], ids=["windows", "all", "one by one"]
)
def test_a_budget_bounds_what_is_read_ahead(
    mapped: str, monkeypatch: pytest.MonkeyPatch, budget: int, most: int
) -> None:
    """Two windows without a budget; with batches of one chunk and a budget of two, these, and one that is leaving."""
    in_memory: set[int] = set()
    peak, lock = [0], threading.Lock()
    load, release = ChunkRegion.map, ChunkRegion.release

    def mapping(region: ChunkRegion, number: int, path: str, nbytes: int) -> bytes:
        with lock:
            in_memory.add(number)
            peak[0] = max(peak[0], len(in_memory))
        return load(region, number, path, nbytes)

    def releasing(region: ChunkRegion, number: int) -> None:
        release(region, number)
        with lock:
            in_memory.discard(number)

    monkeypatch.setattr("teacher_cache.storage.read.stream._GROUP_ROWS", 64)
    monkeypatch.setattr(ChunkRegion, "map", mapping)
    monkeypatch.setattr(ChunkRegion, "release", releasing)
    reader = EmbeddingReader(mapped, memory_bytes=1)
    in_order = [np.arange(start, start + 64) for start in range(0, IMAGES - 64, 64)]
    order, threads = (in_order, 1) if most == 4 else (epoch(reader, 0), None)
    for _ in reader.stream("text", order, read_ahead_bytes=budget, threads=threads):
        pass
    assert in_memory == set()
    assert peak[0] <= most
    assert reader.objects_read == CHUNKS


def fill_views(location: str, chunk_rows: int, dtype: Literal["float16", "int8"]) -> str:
    """600 images in three views, the known rows turned by the number of the view."""
    plan_known_cache(location, images=600, captions=600, chunk_rows=chunk_rows, dtype=dtype, views=3)
    finish_known_cache(location, change=turn_by_view)
    return location


def turn_by_view(ref: ChunkRef, arrays: dict[str, np.ndarray]) -> None:
    arrays["embedding"] = np.roll(arrays["embedding"], ref.view, axis=1)


@pytest.mark.parametrize("chunk_rows", [CHUNK_ROWS, 512, 100])
@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_views_by_row(tmp_path: Path, chunk_rows: int, dtype: Literal["float16", "int8"]) -> None:
    location = fill_views(str(tmp_path / "c"), chunk_rows, dtype)
    rng = np.random.default_rng(0)
    order = [(rng.integers(0, 600, 50), rng.integers(0, 3, 50)) for _ in range(9)]
    reader = EmbeddingReader(location)
    resident = reader.resident("image")
    for (rows, views), values in zip(order, EmbeddingReader(location).stream("image", order), strict=True):
        wanted = [np.roll(known_row("image", row), view) for row, view in zip(rows, views, strict=True)]
        np.testing.assert_allclose(values, wanted, atol=0 if dtype == "float16" else 0.01)
        np.testing.assert_array_equal(reader.take("image", rows, views), values)
        np.testing.assert_array_equal(resident.take(rows, views.astype(np.int8)), values)
        np.testing.assert_array_equal(resident.take(rows, 1), reader.take("image", rows, 1))
    with pytest.raises(ValueError, match=r"50 rows and views of shape \(1,\)"):
        resident.take(rows, np.array([1]))
    with pytest.raises(IndexError, match="image view 3 asked for, views are 0 to 2"):
        list(EmbeddingReader(location).stream("image", [(np.array([1]), np.array([3]))]))


def test_a_quarantined_row_is_refused(location: str) -> None:
    reader = EmbeddingReader(location)
    row = reader.quarantined[0].row
    stream = reader.stream("image", [np.array([0]), np.array([row - 1, row])])
    with pytest.raises(CacheCorruptError, match=f"image row {row} was quarantined and has no embedding"):
        list(stream)
    assert len(list(reader.stream("image", [np.array([row - 1, row + 1])]))) == 1


@pytest.mark.parametrize(("rows", "found"), [([3, -1], "row -1 asked for, rows are 0 to 1999"), ([2000], "row 2000")])
def test_rows_outside_the_cache(location: str, rows: list[int], found: str) -> None:
    with pytest.raises(IndexError, match=found):
        list(EmbeddingReader(location).stream("image", [np.array(rows)]))


@pytest.mark.parametrize("chunk_rows", [CHUNK_ROWS, 250])
@pytest.mark.parametrize("damage", ["flipped", "checksum", "short", "long", "missing", "swapped", "unreadable"])
def test_damage_is_found_when_a_chunk_is_first_read(tmp_path: Path, chunk_rows: int, damage: str) -> None:
    location = fill_known_cache(str(tmp_path / "c"), chunk_rows)
    path, other = (Path(location) / f"targets.zarr/text/embedding/c/{chunk}/0" for chunk in (1, 2))
    data = bytearray(path.read_bytes())
    path.unlink()
    if damage == "swapped":
        path.write_bytes(other.read_bytes())
    elif damage == "unreadable":
        path.symlink_to("/proc/self/mem")  # opens, and answers the first read with EIO
    elif damage != "missing":
        data[{"flipped": 77, "checksum": -1}.get(damage, 0)] ^= damage in ("flipped", "checksum")
        path.write_bytes({"short": data[:-9], "long": data + b"x"}.get(damage, data))
    stream = EmbeddingReader(location).stream("text", [np.arange(3), np.arange(chunk_rows, chunk_rows + 3)])
    kind = CacheUnreachableError if damage == "unreadable" else CacheCorruptError
    with pytest.raises(kind, match=r"text/embedding/c/1/0"):
        list(stream)


def test_every_read_finds_what_the_first_one_could_not(tmp_path: Path) -> None:
    """Damage of a running training: ``every`` sees it in the next epoch, ``first`` does not look again."""
    location = fill_known_cache(str(tmp_path / "c"), CHUNK_ROWS)
    reader = EmbeddingReader(location)
    order = [np.arange(0, IMAGES, 3)]
    list(reader.stream("text", order))
    path = Path(location) / "targets.zarr/text/embedding/c/1/0"
    data = bytearray(path.read_bytes())
    data[77] ^= 1
    path.write_bytes(data)
    list(reader.stream("text", order))
    with pytest.raises(CacheCorruptError, match=r"text/embedding/c/1/0: checksum"):
        list(reader.stream("text", order, prove="every"))


def test_a_stream_of_more_than_fits_in_memory(remote: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Uniform order over a store with room for two chunks: slow, and right, and no chunk is copied beside."""
    monkeypatch.setattr(ChunkRegion, "fill", None)
    reader = EmbeddingReader(remote, memory_bytes=2 * 4096)
    order = [np.random.default_rng(0).permutation(IMAGES)[:100] for _ in range(2)]
    for rows, values in zip(order, reader.stream("text", order), strict=True):
        np.testing.assert_array_equal(values, [known_row("text", row) for row in rows])
    assert reader.chunks.held_bytes <= 2 * 4096


def test_batches_are_not_looked_at_without_end(mapped: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """However narrow an array is: its rows in sight are bounded too."""
    monkeypatch.setattr("teacher_cache.storage.read.stream._GROUP_ROWS", 64)
    monkeypatch.setattr("teacher_cache.storage.read.stream._CHECKED_ROWS", 64)
    monkeypatch.setattr("teacher_cache.storage.read.stream._ROWS_IN_SIGHT", 256)
    asked = itertools.count()
    order = (np.arange(64) for _ in iter(asked.__next__, 1000))
    next(EmbeddingReader(mapped).stream("text", order, array="norm"))
    assert next(asked) <= 6


@pytest.mark.parametrize("array", ["scale", "view", "foo"])
def test_an_array_that_there_is_not(mapped: str, array: str) -> None:
    reader = EmbeddingReader(mapped)
    said = f"no array '{array}' of text rows, there are embedding, norm"
    with pytest.raises(ValueError, match=said):
        reader.take("text", np.array([0]), array=array)
    with pytest.raises(ValueError, match=said):
        next(reader.stream("text", [np.array([0])], array=array))
    with pytest.raises(ValueError, match=said):
        reader.resident("text", array)
    with pytest.raises(ValueError, match=said):
        reader.chunk(ChunkRef("text", 0, 0), array)


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ({"threads": 0}, "at least 0 and 1 are wanted"),
        ({"read_ahead_bytes": -1}, "at least 0 and 1 are wanted"),
        ({"prove": "never"}, "prove is 'never', choose 'first' or 'every'"),
    ],
)
def test_arguments_that_cannot_be(mapped: str, how: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        next(EmbeddingReader(mapped).stream("text", [np.array([0])], **how))


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_a_fork_does_not_go_on_with_its_parents_stream(mapped: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its threads are not there: an error, no waiting for ever."""
    monkeypatch.setattr("teacher_cache.storage.read.stream._GROUP_ROWS", 64)
    reader = EmbeddingReader(mapped)
    stream = reader.stream("image", epoch(reader, 0), read_ahead_bytes=0)
    next(stream)
    child = os.fork()
    if child == 0:
        try:
            list(stream)
        except RuntimeError as error:
            os._exit(7 if "forked" in str(error) else 8)
        os._exit(9)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    assert len(list(stream)) > 1


def test_a_stream_that_is_left_ends_its_threads(mapped: str) -> None:
    before = threading.active_count()
    reader = EmbeddingReader(mapped)
    for _ in itertools.islice(stream := reader.stream("image", epoch(reader, 0)), 2):
        pass
    stream.close()  # type: ignore[attr-defined]
    assert threading.active_count() == before


def test_released_chunks_take_no_memory(tmp_path: Path) -> None:
    """Many times the memory that is in use at once passes through a region."""
    path, size = tmp_path / "chunk", 1 << 20
    path.write_bytes(os.urandom(size) + b"tail")
    region = ChunkRegion(64, (1024, 512), np.dtype("<f2"))
    resident = []
    for number in range(64):
        assert region.map(number, str(path), size + 4) == b"tail"
        assert region.chunk(number).tobytes() == path.read_bytes()[:size]
        region.release(number)
        region.fill(number, np.ones((1024, 512), np.float16))
        assert (region.chunk(number) == 1).all()
        region.release(number)
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        resident.append(pages * os.sysconf("SC_PAGE_SIZE"))
    assert resident[-1] - resident[4] < 8 * size


def test_a_tower_without_rows(tmp_path: Path) -> None:
    """Of a cache of images alone."""
    location = str(tmp_path / "c")
    make_known_cache(location, images=5, captions=0)
    reader = EmbeddingReader(location)
    assert [len(values) for values in reader.stream("text", [np.array([], np.int64)])] == [0]
    assert len(reader.resident("text").rows) == 0


def test_places_of_a_stream_from_a_store_are_used_again(monkeypatch: pytest.MonkeyPatch) -> None:
    location, images = f"memory://{uuid.uuid4()}/x.cache", 200
    make_known_cache(location, images=images, captions=10)
    reader = EmbeddingReader(location)
    monkeypatch.setattr("teacher_cache.storage.read.stream._GROUP_ROWS", 8)
    monkeypatch.setattr("teacher_cache.storage.read.stream._CHECKED_ROWS", 16)
    places: list[int] = []
    fill = ChunkRegion.fill

    def noted(self: ChunkRegion, number: int, values: np.ndarray, again: bool = False) -> None:
        places.append(number)
        fill(self, number, values, again)

    monkeypatch.setattr(ChunkRegion, "fill", noted)
    # a window of three chunks at a time, shuffled
    rng = np.random.default_rng(0)
    order = np.concatenate([rng.permutation(part) for part in np.split(np.arange(images), range(12, images, 12))])
    batches = np.split(order, range(5, images, 5))
    found = np.concatenate(list(reader.stream("image", batches, read_ahead_bytes=2 * 4 * 8 * 2)))
    assert np.array_equal(found, [known_row("image", row) for row in order])
    assert len(places) == reader.objects_read == images // 4
    assert len(set(places)) < images // 8  # of fifty chunks; more than a few are never there together
