"""One contract for every kind of location; each backend is read back past the API under test."""

from __future__ import annotations

import errno
import os
import pickle
import subprocess
import sys
import threading
import uuid
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest

from teacher_cache.storage.errors import CacheAccessError, UsageError
from teacher_cache.storage.files.local import LocalFiles
from teacher_cache.storage.files.location import open_files
from teacher_cache.storage.files.processes import this_process
from teacher_cache.storage.files.protocol import CacheFiles
from teacher_cache.storage.files.remote import RemoteFiles
from teacher_cache.storage.files.stores import open_store
from tests.conftest import ended_process

ODD_KEYS = ["a b", "a+b", "a%20b", "ü/é", "a#b", "a?b", "a&b=c", "a'b", "(a)[1]*", "~a", ".a", "a:b@c", "猫"]


def race_processes(location: str, keys: int = 5, processes: int = 4) -> list[list[bool]]:
    """Per process, whether it created each of ``race/0``, ``race/1``...; all start at the same moment."""
    code = """
import sys
from teacher_cache.storage.files.location import open_files
files = open_files(sys.argv[1])
files.exists("warm")
print("ready", flush=True)
sys.stdin.readline()
print(*[int(files.create(f"race/{key}", sys.argv[2].encode())) for key in range(int(sys.argv[3]))], flush=True)
"""
    children = [
        subprocess.Popen(
            [sys.executable, "-c", code, location, f"process {number}", str(keys)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for number in range(processes)
    ]
    results = []
    for child in children:
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
    for child in children:
        assert child.stdin is not None
        child.stdin.write("go\n")
        child.stdin.flush()
    for child in children:
        out, _ = child.communicate()
        assert child.returncode == 0
        results.append([field == "1" for field in out.split()])
    return results


def check_race(files: CacheFiles, results: list[list[bool]]) -> None:
    """Each key was created by exactly one process, and holds what that one wrote."""
    for key in range(len(results[0])):
        winners = [number for number, won in enumerate(results) if won[key]]
        assert len(winners) == 1
        assert files.read(f"race/{key}") == f"process {winners[0]}".encode()


class FilesContract:
    """What any location promises."""

    races = 10

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
        assert not files.create("a/once.json", b"mine")
        assert self.raw(files, "a/once.json") == b"mine"
        files.delete("a/once.json")
        assert files.create("a/once.json", b"theirs")

    def test_of_racing_threads_exactly_one_creates(self, files: CacheFiles) -> None:
        """Eight at once, several times over; the object is the winner's."""
        for number in range(self.races):
            key, start = f"race/{number}", threading.Barrier(8)

            def create(who: int, key: str = key, start: threading.Barrier = start) -> bool:
                start.wait()
                return files.create(key, b"%d" % who)

            with ThreadPoolExecutor(8) as pool:
                won = list(pool.map(create, range(8)))
            assert won.count(True) == 1
            assert self.raw(files, key) == b"%d" % won.index(True)

    @pytest.mark.parametrize("key", ODD_KEYS)
    def test_keys_with_odd_characters(self, files: CacheFiles, key: str) -> None:
        files.write(f"odd/{key}", key.encode())
        assert self.raw(files, f"odd/{key}") == key.encode()
        assert files.read(f"odd/{key}") == key.encode()
        assert files.exists(f"odd/{key}")
        assert files.list("odd") == [f"odd/{key}"]
        assert not files.create(f"odd/{key}", b"other")
        files.delete(f"odd/{key}")
        assert files.list("odd") == []

    def test_a_large_object(self, files: CacheFiles) -> None:
        data = np.random.default_rng(0).bytes(20_000_001)
        files.write("large", data)
        assert files.read("large") == data
        assert self.raw(files, "large") == data

    def test_a_folder_is_not_what_only_begins_like_it(self, files: CacheFiles) -> None:
        """An object and a folder never share a name in a cache, but ``commits`` and ``commits2`` may both be there."""
        files.write("c/1", b"x")
        files.write("c2/1", b"x")
        files.write("c.json", b"x")
        assert files.list("c") == ["c/1"]
        assert files.list("c.json") == []
        assert not files.exists("c")

    def test_an_empty_location_lists_nothing(self, files: CacheFiles) -> None:
        assert files.list() == []
        assert files.list("a/b") == []

    def test_a_pickled_copy_is_at_the_same_location(self, files: CacheFiles) -> None:
        files.write("a", b"x")
        assert pickle.loads(pickle.dumps(files)).read("a") == b"x"

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

    def test_folders_are_those_of_one_level(self, files: CacheFiles) -> None:
        for key in ("a/x", "b/c/y", "b.json", "b/d/e/z"):
            files.write(key, b"x")
        assert files.folders() == ["a", "b"]
        assert files.folders("b") == ["c", "d"]
        assert files.folders("a") == files.folders("nothing") == []

    def test_size_and_age_of_an_object(self, files: CacheFiles) -> None:
        files.write("a/b", b"four")
        found = files.stat("a/b")
        assert found.nbytes == 4
        assert found.modified is not None
        assert abs((datetime.now(UTC) - found.modified).total_seconds()) < 3600
        for missing in ("a/c", "no"):
            with pytest.raises(FileNotFoundError):
                files.stat(missing)

    def test_partials_of_ended_writers_are_told_and_never_listed(
        self, files: CacheFiles, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        here = this_process()
        processes = {
            "live": here,
            "left": ended_process(),
            "later process of that number": here.model_copy(update={"started": here.started - 1}),
            "elsewhere": here.model_copy(update={"machine": "else-where"}),
        }
        keys = {name: f".partial-{process.tag}-0123abcd" for name, process in processes.items()}
        for key in (*keys.values(), "a/b"):
            files.write(key, b"half")
        assert files.list() == ["a/b"]
        left = [keys["left"], keys["later process of that number"]]
        assert files.partials() == sorted(left)
        monkeypatch.setattr("teacher_cache.storage.files.protocol._GIVEN_UP_SECONDS", -1.0)
        assert files.partials() == sorted([*left, keys["elsewhere"]])

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

    def test_partials_of_ended_writers_are_removed(self, files: CacheFiles) -> None:
        for process in (this_process(), ended_process()):
            files.write(f"a/.partial-{process.tag}-0123abcd", b"half")
        assert files.remove_partials() == 1
        assert files.all_keys() == [f"a/.partial-{this_process().tag}-0123abcd"]

    def test_a_full_disk_leaves_the_old_object_and_no_partial(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        files = LocalFiles(str(tmp_path))
        files.write("a", b"old")

        def full(descriptor: int) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, "fsync", full)
        for put, key in ((files.write, "a"), (files.create, "b")):
            with pytest.raises(OSError, match="No space left"):
                put(key, b"new")
        assert [path.name for path in tmp_path.iterdir()] == ["a"]
        assert files.read("a") == b"old"

    def test_of_racing_processes_exactly_one_creates(self, files: CacheFiles) -> None:
        check_race(files, race_processes(files.location))

    @pytest.mark.parametrize("number", [errno.EPERM, errno.ENOTSUP, errno.EMLINK])
    def test_create_without_hard_links(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
        def no_link(source: object, target: object) -> None:
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(os, "link", no_link)
        files = LocalFiles(str(tmp_path))
        with ThreadPoolExecutor(8) as pool:
            won = list(pool.map(lambda who: files.create("a", b"%d" % who), range(8)))
        assert won.count(True) == 1
        assert files.read("a") == b"%d" % won.index(True)
        assert [path.name for path in tmp_path.iterdir()] == ["a"]

    def test_a_link_whose_answer_was_lost_counts_as_made(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """NFS sends a call again when no answer comes, and may then report the first one's link as another's."""
        link = os.link

        def link_twice(source: str, target: str) -> None:
            link(source, target)
            link(source, target)

        monkeypatch.setattr(os, "link", link_twice)
        assert LocalFiles(str(tmp_path)).create("a", b"x")


class TestRemoteFiles(FilesContract):
    @pytest.fixture
    def files(self, tmp_path: Path) -> CacheFiles:
        return RemoteFiles(f"memory://{uuid.uuid4()}/cache")

    def raw(self, files: CacheFiles, key: str) -> bytes:
        return bytes(open_store("memory://").get(f"{files.location.removeprefix('memory://')}/{key}").bytes())


def test_a_location_chooses_its_kind(tmp_path: Path) -> None:
    assert isinstance(open_files(tmp_path), LocalFiles)
    assert isinstance(open_files("memory://x"), RemoteFiles)
    assert open_files(f"file://{tmp_path}").location == str(tmp_path)


def test_a_home_folder_is_found_without_a_shell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``--cache=~/x`` comes as it is from bash, and from every TOML file."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    open_files("~/x.cache").write("a", b"a")
    assert (tmp_path / "x.cache" / "a").read_bytes() == b"a"
    assert not (tmp_path / "~").exists()


def test_a_relative_location_stays_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    files = open_files("c")
    files.write("a", b"a")
    monkeypatch.chdir(tmp_path / "elsewhere")
    for mine in (files, pickle.loads(pickle.dumps(files))):
        assert mine.read("a") == b"a"
        mine.write("b", b"b")
        assert mine.list() == ["a", "b"]
        assert Path(mine.path("a")) == tmp_path / "c" / "a"
        assert mine.location == "c"
    assert list((tmp_path / "elsewhere").iterdir()) == []


def test_a_folder_that_cannot_be_listed_is_not_empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A network disk that is away for a moment would otherwise have everything encoded once more."""
    files = LocalFiles(str(tmp_path))
    files.write("commits/a", b"a")
    files.write("commits/b/c", b"c")
    scandir = os.scandir
    for number, wanted in ((errno.EIO, OSError), (errno.EACCES, CacheAccessError)):

        def failing(path: str, number: int = number) -> object:
            if path.endswith("commits/b"):
                raise OSError(number, os.strerror(number), path)
            return scandir(path)

        with monkeypatch.context() as trouble:
            trouble.setattr(os, "scandir", failing)
            for look in (files.list, files.partials):
                with pytest.raises(wanted, match="commits/b"):
                    look()
            assert files.list("nothing") == []


def test_links_to_folders_are_listed_and_no_folder_twice(tmp_path: Path) -> None:
    """``commits/image`` may lie on another disk; a link to a folder above must not go on for ever."""
    files = LocalFiles(str(tmp_path / "c"))
    files.write("a/one", b"1")
    (tmp_path / "disk").mkdir()
    (tmp_path / "disk" / "two").write_bytes(b"2")
    (tmp_path / "c" / "b").symlink_to(tmp_path / "disk")
    (tmp_path / "c" / "a" / "loop").symlink_to(tmp_path / "c")
    assert files.list() == ["a/one", "b/two"]
    assert files.list("b") == ["b/two"]


@pytest.mark.parametrize(
    ("location", "shown"),
    [
        ("s3://AKIAKEY:s3cr3t@bucket/x.cache", "s3://***@bucket/x.cache"),
        ("s3://AKIAKEY:s3/cr3t+@bucket/x.cache", "s3://***@bucket/x.cache"),
        ("https://me:s3cr3t@host/x.cache", "https://***@host/x.cache"),
        ("https://host/x.cache?X-Amz-Signature=s3cr3t", "https://host/x.cache?X-Amz-Signature=***"),
    ],
)
def test_credentials_in_a_location_are_refused_and_not_repeated(location: str, shown: str) -> None:
    with pytest.raises(UsageError, match="must not hold credentials") as refused:
        open_files(location)
    assert str(refused.value).startswith(f"{shown}: ")
    assert "cr3t" not in str(refused.value)


@pytest.mark.parametrize(
    ("location", "wanted"),
    [
        ("s3://", "names no bucket"),
        ("s3:///x", "names no bucket"),
        ("s3://bucket/x?versionId=1", "not one version"),
        ("simplecache::s3://bucket/x", "chained"),
        ("nothing://x", "nothing"),
        ("", "the location of a cache is empty"),
        ("s3:/bucket/x.cache", "s3:/bucket/x.cache: a URL has two slashes, s3://... ; a folder of that name is ./s3:"),
    ],
)
def test_locations_that_cannot_be_used(location: str, wanted: str) -> None:
    with pytest.raises(UsageError, match=wanted):
        open_files(location)


def test_without_obstore_a_url_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "teacher_cache.storage.files.remote", None)
    with pytest.raises(UsageError, match=r"needs obstore, which is not installed: .*pip install .*\[s3\]'"):
        open_files("s3://bucket/x.cache")


def test_a_store_that_only_looks_before_it_writes_may_not_create() -> None:
    with pytest.raises(UsageError, match="cannot promise that only one"):
        open_files("http://127.0.0.1:9/x.cache").create("a", b"x")
