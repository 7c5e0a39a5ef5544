"""Claims: one of many gets each, the living keep theirs, those of the dead are taken over."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from teacher_cache.storage.errors import CacheIncompleteError
from teacher_cache.storage.files.claim_records import CLAIMS
from teacher_cache.storage.files.local import LocalFiles
from teacher_cache.storage.files.processes import ProcessName, this_process
from teacher_cache.storage.format.commits import COMMITS, ChunkRef, all_chunks
from teacher_cache.storage.format.manifest_file import finished_how, read_manifest
from teacher_cache.storage.read.reader import EmbeddingReader
from teacher_cache.storage.write.claims import Claims, claimed_by, clear_claims
from teacher_cache.storage.write.writer import EmbeddingWriter
from tests.conftest import known_arrays, plan_known_cache

SPAWN = multiprocessing.get_context("spawn")
NEVER = 3600.0


def take_all(path: str, names: list[str], got: Any, go_on: Any) -> None:
    with Claims(LocalFiles(path)) as claims:
        got.put([name for name in names if claims.take(name)])
        go_on.get()  # hold them until the others have tried


def take_and_hang(path: str, name: str) -> None:
    claims = Claims(LocalFiles(path))
    assert claims.take(name)
    time.sleep(NEVER)


def wait_for(path: Path) -> None:
    until = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < until
        time.sleep(0.01)


def test_of_many_threads_one_gets_each_claim(tmp_path: Path) -> None:
    names = [f"image/v0/{chunk:06d}" for chunk in range(20)]
    workers = [Claims(LocalFiles(str(tmp_path))) for _ in range(8)]
    try:
        with ThreadPoolExecutor(8) as pool:
            won = Counter(name for got in pool.map(lambda w: [n for n in names if w.take(n)], workers) for name in got)
        assert won == dict.fromkeys(names, 1)
    finally:
        for worker in workers:
            worker.__exit__(None, None, None)
    assert LocalFiles(str(tmp_path)).list(CLAIMS) == []


def test_of_several_processes_one_gets_each_claim(tmp_path: Path) -> None:
    names = [f"text/{chunk:06d}" for chunk in range(20)]
    got, go_on = SPAWN.SimpleQueue(), SPAWN.SimpleQueue()
    processes = [SPAWN.Process(target=take_all, args=(str(tmp_path), names, got, go_on)) for _ in range(3)]
    for process in processes:
        process.start()
    won = Counter(name for _ in processes for name in got.get())
    for _ in processes:
        go_on.put(None)
    for process in processes:
        process.join(60)
    assert won == dict.fromkeys(names, 1)
    assert LocalFiles(str(tmp_path)).list(CLAIMS) == []


@pytest.mark.parametrize("reaped", [True, False], ids=["ended", "zombie"])
def test_the_claim_of_a_killed_process_is_taken_over_at_once(tmp_path: Path, reaped: bool) -> None:
    process = SPAWN.Process(target=take_and_hang, args=(str(tmp_path), "image/v0/000003"))
    process.start()
    wait_for(tmp_path / CLAIMS / "image-v0-000003.0.json")
    with Claims(LocalFiles(str(tmp_path))) as claims:
        assert not claims.take("image/v0/000003")
        assert process.pid is not None
        os.kill(process.pid, signal.SIGKILL)
        if reaped:
            process.join(60)
        else:
            until = time.monotonic() + 60
            while "Z" not in Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0]:
                assert time.monotonic() < until
        assert claims.take("image/v0/000003")
        assert claims.take("image/v0/000003")  # asked again it is still ours
        assert claims.take("image/v0/000004")
        with Claims(LocalFiles(str(tmp_path))) as others:
            assert not others.take("image/v0/000003")
    process.join(60)
    left = LocalFiles(str(tmp_path)).list(CLAIMS)
    assert [key for key in left if not key.startswith(f"{CLAIMS}/alive/")] == [f"{CLAIMS}/image-v0-000003.0.json"]
    clear_claims(LocalFiles(str(tmp_path)))
    assert LocalFiles(str(tmp_path)).list(CLAIMS) == []


def foreign_claim(path: Path, name: str, **changes: object) -> None:
    """A claim as another process would have left it, with what is told of that process."""
    process = this_process().model_copy(update=changes)
    (path / CLAIMS / "alive").mkdir(parents=True, exist_ok=True)
    record = {"owner": "other", "process": process.model_dump(), "beat_seconds": 0.05}
    (path / CLAIMS / f"{name}.0.json").write_text(json.dumps(record))


def test_a_process_number_given_to_a_later_process_is_not_alive(tmp_path: Path) -> None:
    foreign_claim(tmp_path, "text-000000", started=this_process().started - 1)
    foreign_claim(tmp_path, "text-000001")
    with Claims(LocalFiles(str(tmp_path))) as claims:
        assert claims.take("text/000000")
        assert not claims.take("text/000001")  # of this very process, by another object: it lives


def test_another_machine_is_believed_as_long_as_its_beat_changes(tmp_path: Path) -> None:
    foreign_claim(tmp_path, "text-000000", machine="elsewhere-0")
    beat = tmp_path / CLAIMS / "alive" / "other.json"
    with Claims(LocalFiles(str(tmp_path))) as claims:
        for number in range(8):
            beat.write_text(f"{number}\n")
            assert not claims.take("text/000000")
            time.sleep(0.05)  # 8 times: longer than the patience of 4 beats
        until = time.monotonic() + 30
        while not claims.take("text/000000"):  # now it is silent
            assert time.monotonic() < until
            time.sleep(0.01)


def test_an_unfinished_cache_names_the_processes_that_work_on_it(tmp_path: Path) -> None:
    """One that has ended, or is elsewhere and silent, is none; then the command is named that finishes the cache."""
    files = LocalFiles(str(tmp_path / "c"))
    plan_known_cache(tmp_path / "c")
    manifest, rerun = read_manifest(files), "Run the same precompute command again to finish it"
    assert finished_how(files, manifest) == rerun
    with Claims(files) as claims:
        claims.take("text/000000")
        claims.take("text/000001")
        working = f"Now process {os.getpid()} on this machine works on it: wait until it is finished"
        assert finished_how(files, manifest) == working
        with pytest.raises(CacheIncompleteError, match=rf"c: 0 of \d+ chunks are there\. {working}\.$"):
            EmbeddingReader(files.location)
    assert finished_how(files, manifest) == rerun
    foreign_claim(tmp_path / "c", "text-000000", machine="gpu-7-0123abcd", pid=4711)
    beat = tmp_path / "c" / CLAIMS / "alive" / "other.json"
    beat.write_text("1\n")
    os.utime(beat, (time.time() + 60, time.time() + 60))  # fresh for longer than this test takes
    assert finished_how(files, manifest).startswith("Now process 4711 on gpu-7 works on it")
    os.utime(beat, (0, 0))
    assert finished_how(files, manifest) == rerun
    foreign_claim(tmp_path / "c", "text-000000", started=this_process().started - 1)
    assert finished_how(files, manifest) == rerun


def test_a_claim_that_cannot_be_read_is_taken_over(tmp_path: Path) -> None:
    (tmp_path / CLAIMS).mkdir()
    (tmp_path / CLAIMS / "text-000000.0.json").write_text("")
    with Claims(LocalFiles(str(tmp_path))) as claims:
        assert claims.take("text/000000")


def test_an_interrupt_while_a_claim_is_made_leaves_none(tmp_path: Path) -> None:
    """It is given back if it was ours, and left if somebody else has it."""
    files = LocalFiles(str(tmp_path))
    create = files.create
    stop = False

    def interrupted(key: str, data: bytes) -> bool:
        create(key, data)
        if stop:
            raise KeyboardInterrupt
        return True

    with Claims(files) as other:
        assert other.take("theirs")
        files.create = interrupted  # type: ignore[method-assign]
        for name in ("ours", "theirs"):
            stop = False
            with contextlib.suppress(KeyboardInterrupt), Claims(files) as claims:
                assert claims.take("before")
                stop = True
                claims.take(name)
        left = [key for key in files.list(CLAIMS) if "alive" not in key]
        assert left == [f"{CLAIMS}/theirs.0.json"]


def test_it_beats_while_it_holds_something(tmp_path: Path) -> None:
    with Claims(LocalFiles(str(tmp_path)), beat_seconds=0.01) as claims:
        assert not (tmp_path / CLAIMS).exists()
        claims.take("text/000000")
        (beat,) = (tmp_path / CLAIMS / "alive").glob("*.json")  # not what is only being written
        first, until = beat.read_text(), time.monotonic() + 30
        while beat.read_text() == first:
            assert time.monotonic() < until
            time.sleep(0.01)
    assert threading.active_count() == 1 or not any(t.name == "claims" for t in threading.enumerate())


@pytest.mark.parametrize("many", [list, iter], ids=["a few, each looked at", "by a listing"])
def test_shared_chunks_are_given_out_once_and_done_ones_never(tmp_path: Path, many: Callable[..., Any]) -> None:
    manifest = plan_known_cache(tmp_path / "c", images=16, captions=16)
    writer = EmbeddingWriter(str(tmp_path / "c"))
    refs = all_chunks(manifest.layout)
    stretches = [[ref] for ref in refs]
    writer.write(refs[0], known_arrays(writer, refs[0]))

    def done(ref: ChunkRef) -> bool:
        return writer.is_committed(ref)

    with Claims(writer.files) as mine, Claims(writer.files) as others:
        first, second = mine.share(many(stretches), done), others.share(many(stretches), done)
        shared = [next(first), next(second), next(first), next(second)]
        assert shared == stretches[1:5]
        writer.write(refs[5], known_arrays(writer, refs[5]))  # by a third one, that gave its claim back
        assert list(first) == stretches[6:]
        assert list(second) == []


def test_the_views_of_the_same_images_are_one_claim(tmp_path: Path) -> None:
    views = [ChunkRef("image", view, 3) for view in range(3)]
    files = LocalFiles(str(tmp_path))
    with Claims(files) as mine, Claims(files) as others:
        assert list(mine.share([views], lambda ref: ref.view == 1)) == [[views[0], views[2]]]
        assert list(others.share([views[2:]], lambda ref: False)) == []
        assert [key for key in files.list(CLAIMS) if "alive" not in key] == [f"{CLAIMS}/image-000003.0.json"]
        assert claimed_by(files, this_process(), [*views, ChunkRef("text", 0, 3)]) == views


def test_a_name_that_ended_many_processes_is_taken_by_who_accepts_it(tmp_path: Path) -> None:
    foreign_claim(tmp_path, "text-000000", started=this_process().started - 1)
    files = LocalFiles(str(tmp_path))
    with Claims(files) as claims:
        assert not claims.take("text/000000", takeovers=0)
        assert claims.take("text/000000", takeovers=1)
    assert claims.take("text/000000")


def test_a_few_chunks_cost_no_listing_of_all_commits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files, listed = LocalFiles(str(tmp_path)), []
    monkeypatch.setattr(LocalFiles, "list", lambda self, prefix="": listed.append(prefix) or [])
    for count, listings in ((16, 0), (17, 1)):
        with Claims(files) as claims:
            stretches = [[ChunkRef("text", 0, number)] for number in range(count)]
            assert list(claims.share(stretches, lambda ref: False)) == stretches
        assert listed == [COMMITS] * listings


def test_a_process_of_another_boot_cannot_be_asked() -> None:
    here = this_process()
    assert here.alive() is True
    assert ProcessName(machine="elsewhere", pid=here.pid, started=here.started).alive() is None
