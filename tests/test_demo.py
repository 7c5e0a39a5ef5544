"""The first command that a newcomer types, run as it is typed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from teacher_cache.pipeline.cli.demo import CACHE_NAMES
from teacher_cache.storage.check.verify import verify_cache


def test_the_demo_measures_a_real_gap(tmp_path: Path) -> None:
    """Its whole run: real scenes, a trained teacher, a student from the cache; stages and table of one process."""
    env = {**os.environ, "OMP_NUM_THREADS": str(os.cpu_count())}
    command = [
        sys.executable,
        "-m",
        "teacher_cache.pipeline.cli.app",
        "demo",
        "--out",
        str(tmp_path / "demo"),
        "--json",
    ]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    found = result["evaluation"]
    chance = 100 / found["images"]
    for direction in ("i2t", "t2i"):
        assert found["teacher"][direction]["R@1"] > 50
        assert found["student"][direction]["R@1"] > 10 * chance
        assert found["student"][direction]["R@1"] < found["teacher"][direction]["R@1"]
    assert result["student_parameters"] < 0.6 * result["teacher_parameters"]
    assert 20 < found["retention"]["mean"] < 100
    assert set(result["seconds"]) == {"precompute", "train", "evaluate"}
    report = verify_cache(str(tmp_path / "demo" / "scenes.cache"))
    assert report.ok
    assert report.images >= 2000
    assert report.captions >= 8000


def test_a_second_demo_may_replace_whatever_the_first_one_left(known_cache: Path) -> None:
    assert {path.name for path in known_cache.iterdir()} | {"journal"} <= CACHE_NAMES
