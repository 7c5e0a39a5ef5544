"""Killed at any moment, precompute loses no committed chunk and ends in the bytes of an unbroken run."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from storage.errors import CacheNotFoundError
from storage.inspect import describe_cache
from storage.integrity import verify_cache
from tests.conftest import cache_digest, write_photos
from tests.precompute_process import Event, finish, start

MakePhotos = Callable[..., Path]
CHUNKS = 6 + 12  # 24 images and 48 captions by 4

# where a kill may fall, and how many of the seeded moments fall there; 50 in all
MOMENTS: dict[str, tuple[int, Callable[[str, str], bool]]] = {
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


class Work:
    """A small dataset and what an unbroken run over it does and leaves."""

    def __init__(self, photos: Path, teacher: Path, folder: Path) -> None:
        self.folder = folder
        self.config: dict[str, Any] = {
            "dataset": f"flickr:{photos}",
            "teacher": f"local-dir:{teacher}",
            "device": "cpu",
            "batch_size": 2,
            "chunk_rows": 4,
            "decode_threads": 2,
        }
        self.events: list[Event] = [(kind, key) for kind, key in self.run("whole")["events"]]
        self.digest = cache_digest(folder / "whole")

    def run(self, name: str) -> dict[str, Any]:
        out = self.folder / f"{name}.json"
        found = finish(start(self.config | {"cache": str(self.folder / name)}, out=out), out)
        assert "error" not in found, found
        return found

    def killed(self, name: str, at: int) -> None:
        process = start(self.config | {"cache": str(self.folder / name)}, out=self.folder / "never", kill_at=at)
        process.join(120)
        assert process.exitcode == -9, f"event {at} of {len(self.events)} never came"

    def commits(self, name: str) -> dict[Path, bytes]:
        return {path: path.read_bytes() for path in (self.folder / name / "commits").rglob("[0-9]*.json")}

    def check_resumed(self, name: str) -> None:
        """What is there after a kill is sound; going on encodes exactly what was not committed."""
        before = self.commits(name)
        try:
            report = verify_cache(str(self.folder / name))
        except CacheNotFoundError:
            assert not before
        else:
            assert {finding.kind for finding in report.findings} <= {"incomplete"}, report.findings
            assert report.chunks_sound == len(before)
        assert self.run(name)["result"]["chunks_encoded"] == CHUNKS - len(before)
        after = self.commits(name)
        assert {path: after[path] for path in before} == before
        assert cache_digest(self.folder / name) == self.digest


@pytest.fixture(scope="module")
def work(tiny_teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Work:
    folder = tmp_path_factory.mktemp("killed")
    return Work(write_photos(folder / "photos", 24), tiny_teacher, folder)


def test_there_are_fifty_moments() -> None:
    assert sum(count for count, _ in MOMENTS.values()) == 50


@pytest.mark.parametrize("moment", MOMENTS)
def test_killed_at_a_seeded_moment_nothing_is_lost_or_done_twice(work: Work, moment: str) -> None:
    count, chosen = MOMENTS[moment]
    places = [number for number, event in enumerate(work.events) if chosen(*event)]
    for number, at in enumerate(random.Random(f"2026 {moment}").sample(places, count)):
        name = f"{moment}-{number}".replace(" ", "-")
        work.killed(name, at)
        work.check_resumed(name)


def test_killed_from_outside_again_and_again(work: Work) -> None:
    """One cache, killed by its parent after random delays until a run gets through."""
    random_seconds, kills = random.Random(2026), 0
    cache = work.folder / "outside"
    while kills < 8:
        process = start(work.config | {"cache": str(cache)}, out=work.folder / "out", teacher_seconds=0.02)
        commits, until = len(work.commits("outside")), time.monotonic() + 60
        while len(work.commits("outside")) == commits and process.is_alive():
            assert time.monotonic() < until
            time.sleep(random_seconds.uniform(0, 0.02))
        if not process.is_alive():
            break
        time.sleep(random_seconds.uniform(0, 0.05))
        process.kill()
        process.join(60)
        kills += 1
    assert kills >= 3
    work.check_resumed("outside")
    assert describe_cache(str(cache)).sealed
