"""``repair --leftovers``: finds what belongs to nothing, touches nothing until told to, never a file of the cache."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from click.testing import CliRunner

from teacher_cache.pipeline.cli.app import app
from teacher_cache.storage.check.garbage import collect_garbage
from teacher_cache.storage.check.verify import verify_cache
from teacher_cache.storage.errors import CacheAccessError, CacheCorruptError, CacheNotFoundError, UsageError
from teacher_cache.storage.files.claim_records import CLAIMS
from teacher_cache.storage.files.local import LocalFiles
from teacher_cache.storage.files.location import open_files
from teacher_cache.storage.files.processes import this_process
from teacher_cache.storage.write.claims import Claims, left_claims
from tests.conftest import cache_digest, ended_process, finish_known_cache, make_known_cache, plan_known_cache

run = CliRunner()


def litter(path: Path) -> dict[str, str]:
    """Leave one of each kind; kinds by key."""
    process = ended_process()
    partial = f"targets.zarr/image/embedding/c/0/0/.partial-{process.tag}-0123abcd"
    (path / partial).write_bytes(b"half")
    (path / "notes.txt").write_text("of a person")
    (path / "targets.zarr/image/embedding/c/99").mkdir()
    (path / "targets.zarr/image/embedding/c/99/0").write_bytes(b"x" * 10)
    claims = path / CLAIMS / "alive"
    claims.mkdir(parents=True, exist_ok=True)
    claim = {"owner": "dead", "process": process.model_dump(mode="json"), "beat_seconds": 15}
    (path / CLAIMS / "text-000000.0.json").write_text(json.dumps(claim))
    (claims / "dead.json").write_text("3\n")
    return {
        partial: "partial",
        "notes.txt": "unknown-file",
        "targets.zarr/image/embedding/c/99/0": "unknown-file",
        f"{CLAIMS}/text-000000.0.json": "claim",
        f"{CLAIMS}/alive/dead.json": "claim",
    }


def test_a_look_first_and_then_the_deed(known_cache: Path) -> None:
    clean = cache_digest(known_cache)
    assert run.invoke(app, ["repair", str(known_cache), "--leftovers"]).stdout == f"{known_cache}: nothing to collect\n"
    left = litter(known_cache)
    sizes = {key: (known_cache / key).stat().st_size for key in left}
    littered = cache_digest(known_cache)

    found = json.loads(run.invoke(app, ["repair", str(known_cache), "--leftovers", "--json"]).stdout)
    assert {each["key"]: each["kind"] for each in found["found"]} == left
    assert {each["key"]: each["nbytes"] for each in found["found"]} == sizes
    assert (found["deleted"], found["nbytes"]) == (False, sum(sizes.values()))
    shown = run.invoke(app, ["repair", str(known_cache), "--leftovers"])
    assert "unknown-file: notes.txt (11 B)" in shown.stdout
    assert "found; --delete removes them" in shown.stdout
    assert shown.stderr == f"next: teacher-cache repair {known_cache} --leftovers --delete\n"
    assert cache_digest(known_cache) == littered

    known = sum(sizes[key] for key, kind in left.items() if kind != "unknown-file")
    done = run.invoke(app, ["repair", str(known_cache), "--leftovers", "--delete"]).stdout.splitlines()
    assert done[-2:] == [
        f"{known_cache}: 3 files, {known} B deleted",
        "2 unknown files kept; look at them, --delete --unknown removes them too",
    ]
    assert (known_cache / "notes.txt").read_text() == "of a person"
    kept = run.invoke(app, ["repair", str(known_cache), "--leftovers"]).stderr
    assert kept == f"next: teacher-cache repair {known_cache} --leftovers --delete --unknown\n"
    done = run.invoke(app, ["repair", str(known_cache), "--leftovers", "--delete", "--unknown"]).stdout.splitlines()
    assert done[-1] == f"{known_cache}: 2 files, {sum(sizes.values()) - known} B deleted"
    assert cache_digest(known_cache) == clean
    assert verify_cache(str(known_cache)).ok


def test_a_cache_within_a_cache_is_nobodys_garbage(known_cache: Path) -> None:
    inner = known_cache / "b" / "inner.cache"
    plan_known_cache(inner)
    (known_cache / "b" / "x").write_bytes(b"x")
    before = cache_digest(inner)
    assert [each.key for each in collect_garbage(str(known_cache), delete=True, unknown=True).found] == ["b/x"]
    assert cache_digest(inner) == before


def test_a_cache_is_not_begun_among_other_things(tmp_path: Path) -> None:
    """A dataset's folder, or a folder of caches: all in it would be unknown files of the new cache."""
    (tmp_path / "photos" / "images").mkdir(parents=True)
    (tmp_path / "photos" / "captions.txt").write_text("")
    wanted = r"photos: contains captions.txt, images, but a cache needs a folder of its own. Choose .*photos/NAME.cache"
    with pytest.raises(UsageError, match=wanted):
        plan_known_cache(tmp_path / "photos")
    plan_known_cache(tmp_path / "caches" / "a.cache")
    with pytest.raises(UsageError, match=r"contains a\.cache, but a cache"):
        plan_known_cache(tmp_path / "caches")
    with pytest.raises(UsageError, match="is a file, but a cache is a folder"):
        plan_known_cache(tmp_path / "photos" / "captions.txt")
    assert sorted(path.name for path in (tmp_path / "photos").iterdir()) == ["captions.txt", "images"]
    # what a planning that was killed leaves, and an empty folder, are begun with
    (tmp_path / "b" / "samples").mkdir(parents=True)
    (tmp_path / "b" / f".partial-{this_process().tag}-0123abcd").write_bytes(b"half")
    plan_known_cache(tmp_path / "b")
    # not even root may write there
    with pytest.raises(
        CacheAccessError, match=r"/proc/c/d: this user may not write in /proc \(No such file .*\)\. Grant"
    ):
        plan_known_cache(Path("/proc/c/d"))


def test_living_processes_keep_what_they_hold(tmp_path: Path) -> None:
    path = tmp_path / "busy.cache"
    plan_known_cache(path)
    finish_known_cache(path, chunks=4)
    files = LocalFiles(str(path))
    partial = path / f"samples/.partial-{this_process().tag}-0123abcd"
    with Claims(files) as claims:
        assert claims.take("image/v0/000001")
        partial.write_bytes(b"half")
        assert collect_garbage(str(path), delete=True).found == ()
        assert len(files.list(CLAIMS)) == 2
    assert partial.exists()


def test_claims_of_other_machines_are_given_up_after_a_day(known_cache: Path) -> None:
    files = LocalFiles(str(known_cache))
    process = this_process().model_copy(update={"machine": "elsewhere"})
    for owner in ("silent", "beating"):
        claim = {"owner": owner, "process": process.model_dump(mode="json"), "beat_seconds": 15}
        files.write(f"{CLAIMS}/{owner}.0.json", json.dumps(claim).encode())
        files.write(f"{CLAIMS}/alive/{owner}.json", b"1\n")
        os.utime(known_cache / CLAIMS / f"{owner}.0.json", (0, 0))
    files.write(f"{CLAIMS}/alive/new.json", b"1\n")
    files.write(f"{CLAIMS}/torn.0.json", b"{")
    assert left_claims(files) == []
    os.utime(known_cache / CLAIMS / "alive/silent.json", (0, 0))
    os.utime(known_cache / CLAIMS / "torn.0.json", (0, 0))
    assert left_claims(files) == [f"{CLAIMS}/silent.0.json", f"{CLAIMS}/torn.0.json", f"{CLAIMS}/alive/silent.json"]


def test_chunks_in_the_making_are_known(tmp_path: Path) -> None:
    plan_known_cache(tmp_path / "c", views=2)
    files = open_files(str(tmp_path / "c"))
    files.write("targets.zarr/image/embedding/c/1/1/0", b"of view 1")
    assert collect_garbage(str(tmp_path / "c"), delete=True).found == ()
    files.write("targets.zarr/image/embedding/c/1/2/0", b"of no view")
    found = collect_garbage(str(tmp_path / "c")).found
    assert [each.key for each in found] == ["targets.zarr/image/embedding/c/1/2/0"]


def test_without_a_sound_root_nothing_is_garbage(known_cache: Path, tmp_path: Path) -> None:
    with pytest.raises(CacheNotFoundError):
        collect_garbage(str(tmp_path), delete=True)
    (known_cache / "manifest.json").write_bytes(b"x")
    with pytest.raises(CacheCorruptError):
        collect_garbage(str(known_cache), delete=True)


def test_damaged_files_of_the_cache_are_no_garbage(known_cache: Path) -> None:
    chunk = known_cache / "targets.zarr/text/embedding/c/2/0"
    chunk.write_bytes(b"short")
    (known_cache / "commits/text/000001.json").unlink()
    assert collect_garbage(str(known_cache), delete=True).found == ()


@pytest.mark.parametrize("object_store", ["moto"], indirect=True)
def test_gc_of_an_object_store(s3_location: str) -> None:
    location = s3_location
    make_known_cache(location)
    before = cache_digest(location)
    open_files(location).write("stray", b"12345")
    # of a process that was killed between the two puts by which it proves that the store can create exclusively
    probe = f".partial-{ended_process().tag}-0123abcd"
    open_files(location).write(probe, b"first")
    assert [(each.key, each.kind, each.nbytes) for each in collect_garbage(location).found] == [
        (probe, "partial", 5),
        ("stray", "unknown-file", 5),
    ]
    collect_garbage(location, delete=True, unknown=True)
    assert cache_digest(location) == before
    assert open_files(location).partials() == []


def test_nothing_behind_a_link_is_deleted(known_cache: Path, tmp_path: Path) -> None:
    """A cache of somebody else may hold a link to your folders; a link itself is a file like any other."""
    home = tmp_path / "home"
    home.mkdir()
    names = ("diary.txt", f".partial-{ended_process().tag}-0123abcd")
    for name in names:
        (home / name).write_text("x")
    (known_cache / "home").symlink_to(home)
    (known_cache / "diary").symlink_to(home / "diary.txt")
    done = collect_garbage(str(known_cache), delete=True, unknown=True)
    assert [garbage.key for garbage in done.found] == ["diary"]
    assert sorted(path.name for path in home.iterdir()) == sorted(names)
