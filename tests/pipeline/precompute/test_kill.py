"""Killed at any moment, precompute loses no committed chunk and ends in the bytes of an unbroken run."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from teacher_cache.storage.look.info import describe_cache
from tests.conftest import write_photos
from tests.pipeline.precompute.kill_work import Work

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


@pytest.fixture(scope="module")
def work(tiny_teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Work:
    folder = tmp_path_factory.mktemp("killed")
    return Work(write_photos(folder / "photos", 24), tiny_teacher, str(folder), folder)


def test_there_are_fifty_moments() -> None:
    assert sum(count for count, _ in MOMENTS.values()) == 50


@pytest.mark.parametrize("moment", MOMENTS)
def test_killed_at_a_seeded_moment_nothing_is_lost_or_done_twice(work: Work, moment: str) -> None:
    work.check_killed(moment, *MOMENTS[moment])


def test_killed_from_outside_again_and_again(work: Work) -> None:
    """One cache, killed by its parent after random delays until a run gets through."""
    random_seconds, kills = random.Random(2026), 0
    while kills < 8:
        process = work.start("outside", teacher_seconds=0.02)
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
    assert describe_cache(work.location("outside")).sealed
