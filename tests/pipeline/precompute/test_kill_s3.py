"""The same on a real S3 protocol: killed processes, processes at once, servers that fail."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from teacher_cache.storage.check.verify import verify_cache
from teacher_cache.storage.errors import CacheIncompleteError, CacheNotFoundError
from teacher_cache.storage.read.reader import EmbeddingReader
from tests.conftest import cache_digest, write_photos
from tests.object_store import ObjectStore
from tests.pipeline.precompute.kill_work import CHUNKS, PASSES_OF, Work
from tests.precompute_process import finish

pytestmark = pytest.mark.service

# as in test_kill.py, 50 in all; a put has no half, since the server shows an object only when all of it has come
MOMENTS: dict[str, tuple[int, Callable[[str, str], bool]]] = {
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


@pytest.fixture(scope="module")
def work(seaweedfs: ObjectStore, tiny_teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Work]:
    folder = tmp_path_factory.mktemp("killed")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in seaweedfs.environment.items():
            patch.setenv(name, value)
        photos = write_photos(folder / "photos", 24)
        yield Work(photos, tiny_teacher, seaweedfs.location("killed"), folder, seaweedfs.environment)


def test_there_are_fifty_moments() -> None:
    assert sum(count for count, _ in MOMENTS.values()) == 50


@pytest.mark.parametrize("moment", MOMENTS)
def test_killed_at_a_seeded_moment_nothing_is_lost_or_done_twice(work: Work, moment: str) -> None:
    work.check_killed(moment, *MOMENTS[moment])


def test_killed_from_outside_within_its_requests(work: Work) -> None:
    """Random delays: most of a run is spent in requests, so most kills fall into one."""
    pauses, kills = random.Random(2026), 0
    while kills < 6:
        process = work.start("outside")
        commits, until = len(work.commits("outside")), time.monotonic() + 60
        while len(work.commits("outside")) == commits and process.is_alive():
            assert time.monotonic() < until
        if not process.is_alive():
            break
        time.sleep(pauses.uniform(0, 0.1))
        process.kill()
        process.join(60)
        kills += 1
    assert kills >= 2
    work.check_resumed("outside")


def test_a_local_cache_and_one_on_s3_are_the_same(work: Work, tmp_path: Path) -> None:
    local = Work.__new__(Work)
    local.__dict__.update(work.__dict__, root=str(tmp_path), folder=tmp_path)
    local.run("whole")
    assert cache_digest(tmp_path / "whole") == work.digest


@pytest.mark.parametrize("processes", [2, 4])
def test_processes_started_at_once_share_the_work(work: Work, processes: int) -> None:
    name = f"shared-{processes}"
    outs = [work.folder / f"{name}-{number}.json" for number in range(processes)]
    started: list[Any] = [work.start(name, out=out, teacher_seconds=0.1) for out in outs]
    seen: list[int] = []
    while any(process.is_alive() for process in started):
        try:
            reader = EmbeddingReader(work.location(name))
            reader.take("image", reader.image_rows())
        except CacheNotFoundError:
            pass
        except CacheIncompleteError as error:
            seen.append(int(str(error).split(": ")[1].split(" of ")[0]))
        time.sleep(0.05)
    ended = [finish(process, out) for process, out in zip(started, outs, strict=True)]
    assert [end.get("error") for end in ended] == [None] * processes
    assert sum(end["result"]["chunks_encoded"] for end in ended) == CHUNKS
    for tower, passes in PASSES_OF.items():  # none was made twice
        assert sum(end["events"].count(["teacher", tower]) for end in ended) == passes
    assert seen == sorted(seen)
    assert len(set(seen)) > 1, "it was never seen in the making"
    assert verify_cache(work.location(name)).ok
    assert cache_digest(work.location(name)) == work.digest


def test_the_chunks_of_a_killed_process_are_taken_over(work: Work) -> None:
    outs = [work.folder / f"taken-{number}.json" for number in range(2)]
    victim, survivor = (work.start("taken", out=out, teacher_seconds=0.1) for out in outs)
    until = time.monotonic() + 60
    while len(work.commits("taken")) < 2:
        assert time.monotonic() < until
    victim.kill()
    victim.join(60)
    assert "error" not in finish(survivor, outs[1])
    assert cache_digest(work.location("taken")) == work.digest
