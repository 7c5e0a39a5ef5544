"""Chunks load side by side, each once, within what was asked for."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from teacher_cache.storage.errors import CacheCorruptError
from teacher_cache.storage.files.local import LocalFiles
from teacher_cache.storage.read.prefetch import ReadAhead
from teacher_cache.storage.read.reader import EmbeddingReader
from tests.conftest import known_row


def test_what_was_asked_for_is_loaded_once_and_in_order() -> None:
    loaded: list[int] = []
    released: list[int] = []

    def load(key: int) -> int:
        assert key not in loaded or key in released
        loaded.append(key)
        return 10 * key

    with ReadAhead(load, released.append, threads=1) as ahead:
        ahead.ask([3, 1, 3])
        assert [ahead.get(key) for key in (1, 3, 2, 1)] == [10, 30, 20, 10]
        assert loaded == [3, 1, 2]
        ahead.drop(keep=[2])
        assert (ahead.beside([]), ahead.beside([2]), 1 in ahead, 2 in ahead) == (1, 0, False, True)
        assert ahead.get(1) == 10
    assert loaded == [3, 1, 2, 1]
    assert sorted(released) == [1, 1, 2, 3]


def test_an_error_comes_where_its_value_is_wanted() -> None:
    def load(key: int) -> int:
        if key == 1:
            raise CacheCorruptError("damaged")
        return key

    released: list[int] = []
    with ReadAhead(load, released.append, threads=2) as ahead:
        ahead.ask([0, 1, 2])
        assert (ahead.get(0), ahead.get(2)) == (0, 2)
        with pytest.raises(CacheCorruptError, match="damaged"):
            ahead.get(1)
    assert sorted(released) == [0, 2]


def test_what_has_not_begun_when_it_ends_is_not_loaded() -> None:
    begun, go_on, loaded = threading.Event(), threading.Event(), []

    def load(key: int) -> None:
        begun.set()
        go_on.wait()
        loaded.append(key)

    with ReadAhead(load, lambda key: None, threads=1) as ahead:
        ahead.ask(range(9))
        begun.wait()
        ahead.drop(keep=range(0, 9, 2))
        threading.Timer(0.05, go_on.set).start()
    assert loaded == [0]


def test_chunks_are_loaded_side_by_side_and_each_once(known_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four threads meet inside the reading of four chunks; others that want those wait for them."""
    reader = EmbeddingReader(str(known_cache))
    reader.take("image", np.array([0]))  # reads the commits
    meeting = threading.Barrier(4)
    read = LocalFiles.read

    def together(self: LocalFiles, key: str) -> bytes:
        meeting.wait(timeout=60)
        return read(self, key)

    monkeypatch.setattr(LocalFiles, "read", together)
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda row: reader.take("text", np.array([row]))[0], [0, 4, 8, 12, 1, 5, 9, 13]))
    np.testing.assert_array_equal(found, [known_row("text", row) for row in (0, 4, 8, 12, 1, 5, 9, 13)])
    assert reader.objects_read == 1 + 4


def test_a_chunk_that_failed_is_tried_again(known_cache: Path) -> None:
    path = known_cache / "targets.zarr/text/embedding/c/1/0"
    data = path.read_bytes()
    path.write_bytes(data[:-1])
    reader = EmbeddingReader(str(known_cache))
    for _ in range(2):
        with pytest.raises(CacheCorruptError, match="text/embedding/c/1/0"):
            reader.take("text", np.array([5]))
    path.write_bytes(data)
    np.testing.assert_array_equal(reader.take("text", np.array([5]))[0], known_row("text", 5))
