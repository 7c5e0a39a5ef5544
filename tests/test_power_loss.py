"""The plug is pulled at any moment: what was promised is on the disk, and nothing is believed that is not.

Every write boundary of the real writers is tried, with every loss that POSIX allows (``tests/power_loss.py``).
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from teacher_cache.pipeline.models.run_folder import RunFolder
from teacher_cache.pipeline.models.run_record import RunRecord
from teacher_cache.pipeline.promote.registry import StudentRegistry
from teacher_cache.pipeline.train.loop import train
from teacher_cache.storage.check.verify import verify_cache
from teacher_cache.storage.errors import CacheIncompleteError, CacheNotFoundError
from teacher_cache.storage.files import local
from teacher_cache.storage.files.local import LocalFiles
from teacher_cache.storage.files.new_files import new_folder
from teacher_cache.storage.format.commits import ChunkRef
from teacher_cache.storage.read.reader import EmbeddingReader
from teacher_cache.storage.write.writer import EmbeddingWriter
from tests.conftest import known_arrays, plan_known_cache
from tests.pipeline.promote.test_registry import FIELDS
from tests.pipeline.train.train_work import make_student, trace, train_config
from tests.power_loss import Disk, Killed, Left, laid

REFS = [ChunkRef("image", 0, 0), ChunkRef("text", 0, 0), ChunkRef("text", 0, 1)]
CHANGES = 90  # of names, in a run: kills fall before each
FEW = range(3, CHANGES, 15)
Promise = Callable[[Any], None]


def write_cache(folder: Path, promise: Promise = lambda what: None) -> None:
    """Plan, write and seal a small cache, or go on with one."""
    plan_known_cache(folder, images=4, captions=8, chunk_rows=4)
    writer = EmbeddingWriter(str(folder))
    for ref in writer.pending():
        writer.write(ref, known_arrays(writer, ref))
        promise(ref)
    writer.seal()
    promise("sealed")


def lasting(left: Left) -> Left:
    """Files that stand for rows: no claim, and nothing unfinished."""
    return {
        key.removeprefix("c/"): data
        for key, data in left.items()
        if data is not None and not key.startswith("c/claims/") and ".partial-" not in key
    }


def read(home: Path) -> Left:
    return lasting({path.relative_to(home).as_posix(): path.read_bytes() for path in home.rglob("*") if path.is_file()})


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Left:
    """The files of an unbroken run."""
    home = tmp_path_factory.mktemp("whole")
    write_cache(home / "c")
    return read(home)


@pytest.fixture(autouse=True)
def no_real_sync(monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk of these tests is none: what is made of it may be lost with the machine."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """The folder of a disk."""
    home = tmp_path / "home"
    home.mkdir()
    return home


def broken_promise(promised: list[Any], left: Left, whole: Left) -> str:
    """Name the promise of a cache that a power loss has broken; empty if none."""
    files = lasting(left)
    for ref in REFS:
        if files.get(ref.commit_key):
            wrong = [key for key in (ref.commit_key, *ref.object_keys().values()) if files.get(key) != whole[key]]
            if wrong:
                return f"{ref.name} is believed without {wrong}"
        elif ref in promised:
            return f"{ref.name} was committed, and is lost"
    if "sealed" in promised or b'"seal": {' in (files.get("manifest.json") or b""):
        return f"sealed, and {set(whole) ^ set(files)} are missing" if files != whole else ""
    return ""


def require_resumed(left: Left, folder: Path, whole: Left) -> None:
    """Open what was left as a reader does, then run the same command again: it ends in the same bytes."""
    cache = laid(left, folder) / "c"
    try:
        EmbeddingReader(str(cache))
    except (CacheIncompleteError, CacheNotFoundError):
        pass
    else:
        assert verify_cache(str(cache)).ok
    write_cache(cache)
    assert read(folder) == whole
    assert verify_cache(str(cache)).ok


def recorded(home: Path, kill_at: int | None = None) -> Disk:
    """Write a cache; where it is killed, run the same command again."""
    with Disk(home, kill_at) as disk:
        with contextlib.suppress(Killed):
            write_cache(home / "c", disk.promise)
        if kill_at is not None:
            disk.revive()
            write_cache(home / "c", disk.promise)
    return disk


def test_what_a_cache_promised_survives_and_the_rest_is_made_again(home: Path, tmp_path: Path, whole: Left) -> None:
    disk = recorded(home)
    losses, tried = list(disk.losses()), set[Any]()
    assert disk.changes <= CHANGES
    assert len(losses) > 200
    for number, (promised, left) in enumerate(losses):
        assert not broken_promise(promised, left, whole)
        files = frozenset(lasting(left).items())
        if files not in tried or number % 10 == 0:  # what else differs are claims and unfinished files
            tried.add(files)
            require_resumed(left, tmp_path / f"left-{number}", whole)
    assert len(tried) > 20


@pytest.mark.parametrize(
    "kills", [range(3, CHANGES, 15), pytest.param(range(CHANGES), marks=pytest.mark.slow)], ids=len
)
def test_a_kill_before_it_costs_nothing_either(kills: range, tmp_path: Path, whole: Left) -> None:
    """What a killed process had written and not synced is not built upon: the next one syncs it first."""
    for kill_at in kills:
        home = tmp_path / f"killed-{kill_at}"
        home.mkdir()
        losses = list(recorded(home, kill_at).losses(seed=kill_at, some=6))
        for promised, left in losses:
            assert not broken_promise(promised, left, whole), f"killed at {kill_at}"
        require_resumed(losses[len(losses) * kill_at // CHANGES][1], tmp_path / f"left-{kill_at}", whole)


def test_without_hard_links_too(home: Path, tmp_path: Path, whole: Left, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*names: Any) -> None:
        raise OSError(errno.EPERM, "no hard links")

    monkeypatch.setattr(os, "link", refused)
    losses = list(recorded(home).losses())
    for number, (promised, left) in enumerate(losses):
        files = {key: data for key, data in left.items() if data != b""}  # an empty object is one that was claimed
        assert not broken_promise(promised, files, whole)
        if number % 20 == 0:
            require_resumed(left, tmp_path / f"left-{number}", whole)


def unsettled(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(LocalFiles, "settle", lambda self, keys: None)


def trusting_folders(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(LocalFiles, "_make_durable", lambda self, folder: local.make_folder(folder))


@pytest.mark.parametrize(
    ("missing", "deaf", "kill_at", "said"),
    [
        (None, lambda name: name.startswith(".partial-"), None, "is believed without"),  # bytes of files
        (None, lambda name: name in ("text", "v0"), None, "was committed, and is lost"),  # names of commit records
        (None, lambda name: name == "c", None, "was committed, and is lost"),  # names of folders
        (None, lambda name: name == ".", None, "was committed, and is lost"),  # the name of the cache itself
        (unsettled, lambda name: False, 65, "sealed, and"),
        (trusting_folders, lambda name: False, 48, "is believed without"),
    ],
)
def test_without_a_sync_the_loss_is_found(
    missing: Any, deaf: Any, kill_at: int | None, said: str, home: Path, whole: Left, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the search is for: it finds the faults of a writer that leaves out a sync."""
    if missing is not None:
        missing(monkeypatch)
    losses = recorded(home, kill_at).losses(deaf=deaf)
    assert any(said in broken_promise(promised, left, whole) for promised, left in losses)


# folders beside a cache


def test_a_folder_of_output_is_whole_or_not_there(home: Path) -> None:
    with Disk(home) as disk:
        with new_folder(home / "runs" / "out") as folder:
            (folder / "inner").mkdir()
            for name in ("a", "inner/b"):
                (folder / name).write_text(name)
        disk.promise("out")
    losses = list(disk.losses())
    assert len(losses) > 10
    for promised, left in losses:
        files = {key: data for key, data in left.items() if key.startswith("runs/out/") and data is not None}
        assert files in ({}, {"runs/out/a": b"a", "runs/out/inner/b": b"inner/b"})
        assert files or not promised


def test_a_registry_keeps_what_it_was_told(home: Path, tmp_path: Path) -> None:
    with Disk(home) as disk:
        registry, champion = StudentRegistry(str(home / "students")), None
        for _ in range(2):
            candidate = registry.add(FIELDS)
            disk.promise(candidate)
            disk.promise(registry.promote(candidate, champion, "gate"))
            champion = candidate
    for number, (promised, left) in enumerate(disk.losses()):
        after = StudentRegistry(str(laid(left, tmp_path / str(number)) / "students"))
        kept = [*after.candidates(), *after.promotions()]  # every file can be read
        assert all(record in kept for record in promised)


@pytest.fixture
def switched(monkeypatch: pytest.MonkeyPatch) -> Callable[[Disk], dict[str, Left]]:
    """The bytes of each checkpoint when a record is to name it; that record is promised once it is written."""

    def watch(disk: Disk) -> dict[str, Left]:
        checkpoints, write = dict[str, Left](), RunFolder.write

        def switch(self: RunFolder, record: RunRecord) -> None:
            for name in named(record.model_dump(mode="json")):
                checkpoints[name] = read(self.path / name)
            write(self, record)
            disk.promise(record.steps)

        monkeypatch.setattr(RunFolder, "write", switch)
        return checkpoints

    return watch


def named(record: dict[str, Any]) -> list[str]:
    best = record["best"] or {"checkpoint": None}
    return [name for name in (record["checkpoint"], best["checkpoint"]) if name]


def lost_checkpoint(promised: list[int], left: Left, checkpoints: dict[str, Left]) -> str:
    """Name what a run has lost that its record names, or the step that it was told is saved; empty if nothing."""
    if left.get("runs/a/run.json") is None:
        return f"run.json of step {promised[-1]}" if promised else ""
    record = json.loads(left["runs/a/run.json"] or b"")
    if promised and record["steps"] < promised[-1]:
        return f"step {promised[-1]}"
    for name in named(record):
        place = f"runs/a/{name}/"
        lost = {key for key, data in checkpoints[name].items() if left.get(place + key) != data}
        # the newest goes without its state of the optimizer once the run is finished
        if lost and not (record["steps"] == 8 and all(key.startswith("resume/") for key in lost)):
            return f"{name} without {lost}"
    return ""


def test_a_run_names_no_checkpoint_that_is_not_there(
    photo_cache: Path, home: Path, tmp_path: Path, switched: Callable[[Disk], dict[str, Left]]
) -> None:
    student = make_student(tmp_path / "student.json")
    settings: dict[str, Any] = {"checkpoint_steps": 3, "select_split": "test"}
    with Disk(home) as disk:
        checkpoints = switched(disk)
        train(train_config(photo_cache, student, home / "runs" / "a", **settings))
    losses = list(disk.losses(some=4))
    assert len(checkpoints) >= 4
    for promised, left in losses:
        assert not lost_checkpoint(promised, left, checkpoints)
    promised, left = losses[len(losses) // 2]
    run = laid(left, tmp_path / "left") / "runs" / "a"
    train(train_config(photo_cache, student, run, **settings), resume=RunFolder(run).resumable())
    assert trace(run) == trace(home / "runs" / "a")
    # what the search is for: a record that is there before the folder of its checkpoint
    unheard = disk.losses(some=4, deaf=lambda name: name == "checkpoints")
    assert any("without" in lost_checkpoint(promised, left, checkpoints) for promised, left in unheard)
