"""One array in memory, counted once however many processes read it."""

from __future__ import annotations

import multiprocessing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from teacher_cache.storage.errors import CacheCorruptError
from teacher_cache.storage.read.reader import EmbeddingReader
from teacher_cache.storage.read.resident import ResidentRows
from teacher_cache.storage.read.rows import RowPlaces
from tests.storage.read.test_stream import IMAGES, fill_known_cache


@pytest.fixture(scope="module")
def location(tmp_path_factory: pytest.TempPathFactory) -> str:
    return fill_known_cache(str(tmp_path_factory.mktemp("resident") / "c"), 300)


@pytest.mark.parametrize("array", ["embedding", "norm", "view"])
def test_resident_rows_are_those_that_take_gives(location: str, array: str) -> None:
    reader = EmbeddingReader(location)
    rows = np.random.default_rng(0).permutation(reader.image_rows())
    found, wanted = reader.resident("image", array).take(rows), reader.take("image", rows, array=array)
    assert (found.dtype, found.tobytes()) == (wanted.dtype, wanted.tobytes())
    assert reader.resident("image", array).take(rows[:0]).shape == wanted[:0].shape


def test_each_object_is_read_once_and_none_is_held(location: str) -> None:
    reader = EmbeddingReader(location)
    resident = reader.resident("text")
    assert (reader.objects_read, reader.chunks.held_bytes, resident.nbytes) == (7, 0, IMAGES * 16)
    assert not resident.rows.flags.writeable


def test_what_is_not_there_is_refused(location: str) -> None:
    reader = EmbeddingReader(location)
    lost = reader.quarantined[0].row
    resident = reader.resident("image")
    with pytest.raises(ValueError, match=f"image embedding: row {lost} was quarantined"):
        resident.take(np.array([0, lost]))
    for rows, view, said in (
        ([IMAGES], 0, "row 2000"),
        ([-1], 0, "row -1"),
        ([0], 1, "view 1 asked for, views are 0 to 0"),
    ):
        with pytest.raises(IndexError, match=said):
            resident.take(np.array(rows), view)


def test_damage_is_found_while_it_loads(tmp_path: Path) -> None:
    location = fill_known_cache(str(tmp_path / "c"), 300)
    path = Path(location) / "targets.zarr/text/embedding/c/3/0"
    data = bytearray(path.read_bytes())
    data[5] ^= 1
    path.write_bytes(data)
    before = len(list(Path("/proc/self/fd").iterdir()))
    with pytest.raises(CacheCorruptError, match="text/embedding/c/3/0: checksum"):
        EmbeddingReader(location).resident("text")
    assert len(list(Path("/proc/self/fd").iterdir())) == before


MEGABYTES = 32


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> ResidentRows:
    """32 MiB, more than all else that a worker's memory may differ by."""
    rows = np.zeros((MEGABYTES * 1024, 512), np.float16)
    rows[:, 0] = np.arange(len(rows)) % 1000
    places = RowPlaces("test", "image", total=len(rows), chunk_rows=1024, chunks=MEGABYTES, views=1)
    return ResidentRows(rows, places, np.array([], np.int64), None, "test")


def proportional_bytes() -> int:
    """What this process takes, memory that n processes share counted as an n-th: PSS."""
    line = next(line for line in Path("/proc/self/smaps_rollup").read_text().splitlines() if line.startswith("Pss:"))
    return int(line.split()[1]) * 1024


def touch(resident: ResidentRows, together: Any, found: Any) -> None:
    together.wait(timeout=300)  # what forks share with their parent is no longer divided among more of them
    before = proportional_bytes()
    together.wait(timeout=300)
    total = float(resident.rows[:, 0].astype(np.float64).sum())
    together.wait(timeout=300)
    grown = proportional_bytes() - before
    together.wait(timeout=300)
    found.put((total, grown))


@pytest.mark.parametrize("method", ["fork", "spawn"])
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_memory_counts_once_however_many_workers(large: ResidentRows, method: str) -> None:
    """Each of three workers touches all of it; together they and the parent hold it once."""
    wanted = float(large.rows[:, 0].astype(np.float64).sum())
    context = multiprocessing.get_context(method)
    workers = 3
    together, found = context.Barrier(workers), context.Queue()
    processes = [context.Process(target=touch, args=(large, together, found)) for _ in range(workers)]
    for process in processes:
        process.start()
    answers = [found.get(timeout=300) for _ in range(workers)]
    for process in processes:
        process.join(timeout=300)
        assert process.exitcode == 0
    assert [total for total, _ in answers] == [wanted] * workers
    # spawned: three quarters, the parent's share being the fourth; forked: none, theirs from the start. A copy each
    # would be three times as much
    assert sum(grown for _, grown in answers) < 1.2 * MEGABYTES * 2**20
