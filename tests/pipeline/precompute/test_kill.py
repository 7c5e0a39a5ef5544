"""Killed at any moment, or several at once, precompute loses no committed chunk, makes none twice, and ends in the
bytes of an unbroken run; in a folder and on a real S3 protocol.
"""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from teacher_cache.storage.check.verify import verify_cache
from teacher_cache.storage.errors import CacheIncompleteError, CacheNotFoundError
from teacher_cache.storage.files import processes
from teacher_cache.storage.files.claim_records import CLAIMS
from teacher_cache.storage.files.location import open_files
from teacher_cache.storage.format.commits import ChunkRef, all_chunks
from teacher_cache.storage.look.info import describe_cache
from teacher_cache.storage.read.reader import EmbeddingReader
from teacher_cache.storage.write.claims import Claims
from teacher_cache.storage.write.writer import EmbeddingWriter
from tests.conftest import cache_digest, write_photos
from tests.pipeline.precompute.conftest import settings
from tests.precompute_process import Event, finish, passes_of, start

CHUNKS = 6 + 12  # 24 images and 48 captions by 4
PASSES = 2  # forward passes of a chunk
PASSES_OF = {"image": 12, "text": 24}
IN_FLIGHT = 3  # chunks at a time: two that are written or wait for it, and one with the teacher or behind these
_CUT_OFF_IN_PLANNING = {("missing", "manifest.json"), ("incomplete", "manifest.json")}

Moments = dict[str, tuple[int, Callable[[str, str], bool]]]
# where a kill may fall, and how many of the seeded moments fall there; 50 in all
IN_A_FOLDER: Moments = {
    "in decode": (6, lambda kind, key: kind == "decode"),
    "in the teacher": (6, lambda kind, key: kind == "teacher"),
    "in mid-write of a chunk": (
        8,
        lambda kind, key: kind == "half" and key.startswith("targets.zarr/") and "/c" in key,
    ),
    "after the write, before the rename": (4, lambda kind, key: kind == "written" and "/c" in key),
    "between the objects of a chunk": (5, lambda kind, key: kind == "renamed" and "/c" in key),
    "between chunk and commit record": (6, lambda kind, key: kind == "half" and key.startswith("commits/")),
    "behind the commit record": (3, lambda kind, key: kind == "renamed" and key.startswith("commits/")),
    "in a manifest update": (6, lambda kind, key: key == "." and kind != "renamed"),
    "in tables and metadata": (3, lambda kind, key: kind == "half" and key in ("samples", "captions", "targets.zarr")),
    "in a claim": (3, lambda kind, key: key.startswith("claims")),
}
# a put has no half, since the server shows an object only when all of it has come
ON_S3: Moments = {
    "in decode": (5, lambda kind, key: kind == "decode"),
    "in the teacher": (5, lambda kind, key: kind == "teacher"),
    "before the put of a chunk object": (7, lambda kind, key: kind == "before put" and "/c/" in key),
    "between the objects of a chunk": (7, lambda kind, key: kind == "after put" and "/c/" in key),
    "between chunk and commit record": (8, lambda kind, key: kind == "before put" and key.startswith("commits/")),
    "behind the commit record": (5, lambda kind, key: kind == "after put" and key.startswith("commits/")),
    "in a manifest update": (6, lambda kind, key: key.startswith("manifest")),
    "in tables and metadata": (4, lambda kind, key: kind == "after put" and key.endswith((".parquet", "zarr.json"))),
    "behind a claim": (3, lambda kind, key: kind == "after create"),
}
MARKS = {"folder": (), "s3": pytest.mark.service}
MOMENTS = {"folder": IN_A_FOLDER, "s3": ON_S3}


class Work:
    """A small dataset and what an unbroken run over it does and leaves.

    Args:
        root: folder or URL below which the caches lie.
        folder: for results, on this machine.
        environment: of the processes.
    """

    def __init__(self, photos: Path, teacher: Path, root: str, folder: Path, environment: dict[str, str]) -> None:
        self.root, self.folder, self.environment = root, folder, environment
        self.photos, self.teacher = photos, teacher
        self.config = settings(photos, teacher, "", batch_size=2, chunk_rows=4, decode_threads=2)
        self.events: list[Event] = [(kind, key) for kind, key in self.run("whole")["events"]]
        self.digest = cache_digest(self.location("whole"))

    def location(self, name: str) -> str:
        return f"{self.root}/{name}"

    def start(self, name: str, out: Path | None = None, **options: Any) -> Any:
        config = self.config | {"cache": self.location(name)}
        return start(config, out=out or self.folder / f"{name}.json", environment=self.environment, **options)

    def start_together(self, name: str, count: int, seconds: float = 0.1) -> dict[Path, Any]:
        """Processes by the file that their result will be in."""
        outs = [self.folder / f"{name}-{number}.json" for number in range(count)]
        meeting = self.folder / f"{name}-meeting"
        meeting.mkdir()
        return {
            out: self.start(name, out, teacher_seconds=seconds, setup=partial(meet, meeting, number, count))
            for number, out in enumerate(outs)
        }

    def run(self, name: str) -> dict[str, Any]:
        found = finish(self.start(name), self.folder / f"{name}.json")
        assert "error" not in found, found
        return found

    def killed(self, name: str, at: int) -> None:
        """Kill a run at an event. Of the teacher's work, only that on the chunks in flight is lost."""
        out = self.folder / f"{name}.killed"
        process = self.start(name, out=out, kill_at=at)
        process.join(120)
        assert process.exitcode == -9, f"event {at} of {len(self.events)} never came"
        made = passes_of(out).stat().st_size if passes_of(out).exists() else 0
        committed = len(self.commits(name))
        assert PASSES * committed <= made <= PASSES * (committed + IN_FLIGHT), f"{made} passes, {committed} commits"

    def commits(self, name: str) -> dict[str, bytes]:
        files = open_files(self.location(name))
        return {key: files.read(key) for key in files.list("commits")}

    def held_by(self, name: str, pid: int) -> list[str]:
        """Claims of a process on chunks without commit record."""
        files, held = open_files(self.location(name)), []
        for key in files.list(CLAIMS):
            tower, _, chunk = key.removeprefix(f"{CLAIMS}/").partition(".")[0].partition("-")
            try:
                mine = f'"pid":{pid},'.encode() in files.read(key)
            except FileNotFoundError:
                continue
            view = "v0/" if tower == "image" else ""
            if mine and tower in PASSES_OF and not files.exists(f"commits/{tower}/{view}{chunk}.json"):
                held.append(key)
        return held

    def check_resumed(self, name: str) -> None:
        """What is there after a kill is sound; going on encodes exactly what was not committed."""
        before = self.commits(name)
        try:
            report = verify_cache(self.location(name))
        except CacheNotFoundError:
            assert not before
        else:
            found = {(finding.kind, finding.key) for finding in report.findings}
            # killed between the backup and the first manifest: verify says so, the next run takes the backup
            assert found <= {("incomplete", "manifest.json")} or (not before and found <= _CUT_OFF_IN_PLANNING), found
            assert report.chunks_sound == len(before)
        assert self.run(name)["result"]["chunks_encoded"] == CHUNKS - len(before)
        after = self.commits(name)
        assert {key: after[key] for key in before} == before
        assert cache_digest(self.location(name)) == self.digest


def meet(folder: Path, mine: int, wanted: int) -> None:
    """Return when as many processes have come here."""
    (folder / f"{mine}").touch()
    while len(list(folder.iterdir())) < wanted:
        time.sleep(0.005)


@pytest.fixture(scope="module")
def works(
    request: pytest.FixtureRequest, tiny_teacher: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[[str], Work]]:
    """One of each place, made when it is first asked for."""
    with pytest.MonkeyPatch.context() as patch:

        @cache
        def made(place: str) -> Work:
            folder, root, environment = tmp_path_factory.mktemp("killed"), "", dict[str, str]()
            if place == "s3":
                store = request.getfixturevalue("seaweedfs")
                root, environment = store.location("killed"), store.environment
            for name, value in environment.items():
                patch.setenv(name, value)
            photos = write_photos(folder / "photos", 24)
            return Work(photos, tiny_teacher, root or str(folder), folder, environment)

        yield made


@pytest.fixture(params=[pytest.param(place, marks=marks) for place, marks in MARKS.items()])
def work(request: pytest.FixtureRequest, works: Callable[[str], Work]) -> Work:
    return works(request.param)


@pytest.mark.parametrize("place", MOMENTS)
def test_there_are_fifty_moments(place: str) -> None:
    assert sum(count for count, _ in MOMENTS[place].values()) == 50


@pytest.mark.parametrize(
    ("work", "moment"),
    [pytest.param(place, moment, marks=MARKS[place]) for place in MOMENTS for moment in MOMENTS[place]],
    indirect=["work"],
)
def test_killed_at_a_seeded_moment_nothing_is_lost_or_done_twice(work: Work, moment: str) -> None:
    count, chosen = MOMENTS["s3" if "://" in work.root else "folder"][moment]
    places = [number for number, event in enumerate(work.events) if chosen(*event)]
    for number, at in enumerate(random.Random(f"2026 {moment}").sample(places, count)):
        name = f"{moment}-{number}".replace(" ", "-")
        work.killed(name, at)
        work.check_resumed(name)


def test_killed_from_outside_again_and_again(work: Work) -> None:
    """One cache, killed by its parent after random delays until a run gets through; on S3 most fall into a request."""
    pauses, kills = random.Random(2026), 0
    while kills < 8:
        process = work.start("outside", teacher_seconds=0.02)
        commits, until = len(work.commits("outside")), time.monotonic() + 60
        while len(work.commits("outside")) == commits and process.is_alive():
            assert time.monotonic() < until
            time.sleep(pauses.uniform(0, 0.02))
        if not process.is_alive():
            break
        time.sleep(pauses.uniform(0, 0.05))
        process.kill()
        process.join(60)
        kills += 1
    assert kills >= 3
    work.check_resumed("outside")
    assert describe_cache(work.location("outside")).sealed


@pytest.mark.parametrize("work", [pytest.param("s3", marks=MARKS["s3"])], indirect=True)
def test_a_local_cache_and_one_on_s3_are_the_same(work: Work, tmp_path: Path) -> None:
    assert Work(work.photos, work.teacher, str(tmp_path), tmp_path, {}).digest == work.digest


@pytest.mark.parametrize("processes", [2, 4])
def test_processes_started_at_once_share_the_work(work: Work, processes: int) -> None:
    name = f"shared-{processes}"
    started = work.start_together(name, processes)
    ended = [finish(process, out) for out, process in started.items()]
    assert [end.get("error") for end in ended] == [None] * processes
    encoded = [end["result"]["chunks_encoded"] for end in ended]
    assert sum(encoded) == CHUNKS
    assert min(encoded) > 0
    for tower, passes in PASSES_OF.items():  # none was made twice
        assert sum(end["events"].count(["teacher", tower]) for end in ended) == passes
    assert len({end["result"]["manifest_digest"] for end in ended}) == 1
    assert verify_cache(work.location(name)).ok
    assert cache_digest(work.location(name)) == work.digest


def test_a_reader_sees_only_what_is_committed_and_whole(work: Work) -> None:
    cache, seen = work.location("read"), list[int]()
    started = work.start_together("read", 2, seconds=0.2)
    while any(process.is_alive() for process in started.values()):
        try:
            reader = EmbeddingReader(cache)
        except CacheNotFoundError:
            continue
        except CacheIncompleteError:
            try:
                writer = EmbeddingWriter(cache)
            except CacheNotFoundError:
                continue  # being planned: the reader knows it by the manifest's backup
            committed = [ref for ref in all_chunks(writer.manifest.layout) if writer.is_committed(ref)]
            assert all(writer.is_sound(ref) for ref in committed)
            seen.append(len(committed))
        else:
            reader.take("image", reader.image_rows())
            break
    for out, process in started.items():
        assert "error" not in finish(process, out)
    assert seen == sorted(seen)
    assert len(set(seen)) > 2, "it was never seen in the making"
    assert cache_digest(cache) == work.digest


def test_the_chunks_of_a_killed_process_are_taken_over(work: Work) -> None:
    started = work.start_together("taken", 3)
    out, victim = next(iter(started.items()))
    until = time.monotonic() + 60
    while not work.held_by("taken", victim.pid):
        assert time.monotonic() < until
        time.sleep(0.005)
    victim.kill()
    victim.join(60)
    assert work.held_by("taken", victim.pid), "it held nothing when it died"
    rest = [finish(process, path) for path, process in started.items() if path != out]
    assert [end.get("error") for end in rest] == [None, None]
    assert sum(end["result"]["chunks_encoded"] for end in rest) <= CHUNKS
    assert verify_cache(work.location("taken")).ok
    assert cache_digest(work.location("taken")) == work.digest
    assert open_files(work.location("taken")).list(CLAIMS) == []


@pytest.mark.parametrize("work", ["folder"], indirect=True)
def test_two_that_plan_at_once_by_other_defaults_agree(work: Work, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows per batch and chunk left out: whoever plans decides, the other takes it up."""
    monkeypatch.delitem(work.config, "batch_size")
    monkeypatch.delitem(work.config, "chunk_rows")
    ended = [finish(process, out) for out, process in work.start_together("defaults", 2, seconds=0).items()]
    assert [end.get("error") for end in ended] == [None, None]
    assert sum(end["result"]["chunks_encoded"] for end in ended) == ended[0]["result"]["chunks"]


STOPS = {  # in the write of the second object of a chunk, of a commit record, and of the first manifest
    "object": {"folder": ("written", "targets.zarr/text/norm/c"), "s3": ("before put", "targets.zarr/text/norm/c")},
    "record": {"folder": ("written", "commits/text"), "s3": ("before put", "commits/text")},
    "manifest": {"folder": ("written", "."), "s3": ("before put", "manifest")},
}


def be_elsewhere() -> None:
    """Make this process one of another machine, of which others know its heartbeat alone."""
    processes._machine = lambda: "elsewhere-0"  # type: ignore[assignment]
    Claims.__init__.__defaults__ = (0.1,)  # type: ignore[misc]


def round_otherwise() -> None:
    """Make the rows of this process those of another kind of processor, with other libraries."""
    from teacher_cache.pipeline.models.teacher import LiveTeacher

    write = EmbeddingWriter.write

    def rounded(self: EmbeddingWriter, ref: ChunkRef, arrays: dict[str, Any], *rest: Any) -> Any:
        return write(self, ref, arrays | {"norm": np.nextafter(arrays["norm"], np.float32(np.inf))}, *rest)

    EmbeddingWriter.write = rounded  # type: ignore[method-assign]
    LiveTeacher.library_versions = lambda self: {"torch": "another"}  # type: ignore[method-assign]


@pytest.mark.parametrize("stop", STOPS)
def test_one_that_wakes_up_after_the_seal_changes_nothing(work: Work, stop: str) -> None:
    """Stopped within a write for longer than its heartbeat lasts; another, which rounds otherwise, takes over."""
    name, out = f"late-{stop}", work.folder / f"late-{stop}-first.json"
    at = STOPS[stop]["s3" if "://" in work.root else "folder"]
    late = work.start(name, out, stop_at=at, setup=be_elsewhere)
    try:
        until = time.monotonic() + 60
        while Path(f"/proc/{late.pid}/stat").read_text().rpartition(")")[2].split()[0] != "T":
            assert time.monotonic() < until
            time.sleep(0.01)
        other = finish(work.start(name, setup=round_otherwise), work.folder / f"{name}.json")
        assert "error" not in other, other
        files = open_files(work.location(name))
        sealed = {key: files.read(key) for key in files.list() if not key.startswith("journal/")}
    finally:
        os.kill(late.pid, signal.SIGCONT)
    ended = finish(late, out)
    assert ended["result"]["manifest_digest"] == other["result"]["manifest_digest"], ended
    assert {key: files.read(key) for key in files.list() if not key.startswith("journal/")} == sealed
    assert verify_cache(work.location(name)).ok
    told = ["were committed by another process first" in hint for hint in ended["hints"]]
    assert told == ([] if stop == "manifest" else [True])
