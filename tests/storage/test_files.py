"""One contract for every kind of location; each backend is read back past the API under test."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import uuid
from pathlib import Path

import fsspec
import pytest

from storage.files import CacheFiles, LocalFiles, RemoteFiles, open_files


class FilesContract:
    """What any location promises."""

    @pytest.fixture
    def files(self, tmp_path: Path) -> CacheFiles:
        raise NotImplementedError

    def raw(self, files: CacheFiles, key: str) -> bytes:
        raise NotImplementedError

    def test_write_replaces_whole_objects(self, files: CacheFiles) -> None:
        files.write("a/b.bin", b"first, longer")
        files.write("a/b.bin", b"second")
        assert self.raw(files, "a/b.bin") == b"second"
        assert files.read("a/b.bin") == b"second"

    def test_create_leaves_what_is_there(self, files: CacheFiles) -> None:
        assert files.create("a/once.json", b"mine")
        assert not files.create("a/once.json", b"theirs, longer")
        assert self.raw(files, "a/once.json") == b"mine"
        files.delete("a/once.json")
        assert files.create("a/once.json", b"theirs")

    def test_list_gives_sorted_keys_below_a_folder(self, files: CacheFiles) -> None:
        for key in ("c/2.json", "c/10.json", "d/1.json", "top.json"):
            files.write(key, b"x")
        assert files.list("c") == ["c/10.json", "c/2.json"]
        assert files.list() == ["c/10.json", "c/2.json", "d/1.json", "top.json"]
        assert files.list("nothing") == []

    def test_missing_objects(self, files: CacheFiles) -> None:
        assert not files.exists("no")
        with pytest.raises(FileNotFoundError):
            files.read("no")
        files.delete("no")

    def test_delete(self, files: CacheFiles) -> None:
        files.write("a", b"x")
        files.delete("a")
        assert not files.exists("a")


class TestLocalFiles(FilesContract):
    @pytest.fixture
    def files(self, tmp_path: Path) -> CacheFiles:
        return LocalFiles(str(tmp_path / "cache"))

    def raw(self, files: CacheFiles, key: str) -> bytes:
        return (Path(files.location) / key).read_bytes()

    def test_partials_of_dead_writers_are_removed_and_of_live_ones_kept(self, tmp_path: Path) -> None:
        files = LocalFiles(str(tmp_path))
        dead = subprocess.Popen([sys.executable, "-c", "pass"])
        dead.wait()
        left = tmp_path / f".partial-{socket.gethostname()}-{dead.pid}-0123abcd"
        live = tmp_path / f".partial-{socket.gethostname()}-{os.getpid()}-0123abcd"
        left.write_bytes(b"half")
        live.write_bytes(b"half")
        assert files.list() == []  # a reader never sees either
        assert files.remove_partials() == 1
        assert live.exists()
        assert not left.exists()

    def test_a_failed_write_leaves_the_old_object_and_no_partial(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        files = LocalFiles(str(tmp_path))
        files.write("a", b"old")

        def full(descriptor: int) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left"):
            files.write("a", b"new")
        assert [path.name for path in tmp_path.iterdir()] == ["a"]
        assert files.read("a") == b"old"


class TestRemoteFiles(FilesContract):
    @pytest.fixture
    def files(self, tmp_path: Path) -> CacheFiles:
        return RemoteFiles(f"memory://{uuid.uuid4()}/cache")

    def raw(self, files: CacheFiles, key: str) -> bytes:
        data: bytes = fsspec.filesystem("memory").cat_file(files.location.removeprefix("memory:/") + "/" + key)
        return data


def test_a_location_chooses_its_kind(tmp_path: Path) -> None:
    assert isinstance(open_files(tmp_path), LocalFiles)
    assert isinstance(open_files("memory://x"), RemoteFiles)
    assert open_files(f"file://{tmp_path}").location == str(tmp_path)
