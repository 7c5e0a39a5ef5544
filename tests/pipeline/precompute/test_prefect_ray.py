"""The example of a flow on a Ray cluster that a user already has makes the cache that this process makes alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

import pytest

from teacher_cache.pipeline.precompute.run import precompute
from teacher_cache.pipeline.settings.precompute import PrecomputeConfig
from teacher_cache.storage.check.verify import verify_cache
from tests.conftest import cache_digest, write_photos
from tests.pipeline.precompute.conftest import settings

PROJECT = Path(__file__).resolve().parents[3]
IMAGES, CHUNK = 24, 4


@pytest.mark.service
@pytest.mark.timeout(1200)
@pytest.mark.skipif(find_spec("prefect_ray") is None, reason="pip install 'teacher-cache[prefect-ray]'")
def test_a_flow_with_prefects_ray_runner_makes_the_same_cache(tiny_teacher: Path, tmp_path: Path) -> None:
    photos = write_photos(tmp_path / "photos", IMAGES)
    alone, shared = str(tmp_path / "alone.cache"), str(tmp_path / "ray.cache")
    config = settings(photos, tiny_teacher, shared, chunk_rows=CHUNK, decode_threads=1)
    chunks = precompute(PrecomputeConfig(**{**config, "cache": alone})).chunks
    # Ray's sockets lie in it, and the name of a socket has no more than 107 characters
    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as temporary:
        environment = {
            **os.environ,
            "PYTHONPATH": str(PROJECT),
            "OMP_NUM_THREADS": "1",
            "PREFECT_HOME": str(tmp_path / "prefect"),
            "DO_NOT_TRACK": "1",
            "RAY_AUTH_MODE": "disabled",
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_TMPDIR": temporary,
        }
        done = subprocess.run(
            [sys.executable, "-c", "from tests.pipeline.precompute.prefect_ray_work import main; main()"],
            input=json.dumps({"config": config, "store_bytes": 80 * 2**20}),
            env=environment,
            cwd=PROJECT,
            capture_output=True,
            text=True,
            timeout=1000,
        )
    assert done.returncode == 0, done.stderr[-4000:]
    came = json.loads(done.stdout)
    assert (came["found"]["images"], came["found"]["chunks"]) == (IMAGES, chunks)
    assert sum(came["found"]["by_process"].values()) == chunks
    assert len(came["found"]["by_process"]) == 2, "one of the two workers did nothing"
    assert came["again"]["by_process"] == {}
    assert cache_digest(shared) == cache_digest(alone)
    assert verify_cache(shared).ok
