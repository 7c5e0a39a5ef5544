"""precompute on an object store in trouble: a bad network, a store that goes away, a signal; and no secret anywhere."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
import uuid
from pathlib import Path

import pytest

from teacher_cache.pipeline.precompute.run import precompute
from teacher_cache.pipeline.settings.precompute import PrecomputeConfig
from teacher_cache.storage.check.verify import verify_cache
from teacher_cache.storage.errors import CacheNotFoundError
from teacher_cache.storage.files import remote as remote_files
from teacher_cache.storage.files.location import open_files
from teacher_cache.storage.files.remote import RetryPolicy
from teacher_cache.storage.look.info import count_committed
from tests.conftest import cache_digest, write_photos
from tests.fault_proxy import Fault, FaultProxy, Request, refusal
from tests.object_store import ObjectStore
from tests.pipeline.precompute.conftest import as_command, settings
from tests.precompute_process import finish, start

pytestmark = pytest.mark.service

IMAGES, CHUNK = 40, 4
SMALL = {"batch_size": 2, "chunk_rows": CHUNK}
CHUNKS = IMAGES // CHUNK * 3  # two captions an image
SECRET = b"testing-secret"


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_photos(tmp_path_factory.mktemp("photos") / "p", IMAGES)


@pytest.fixture(scope="module")
def digest(photos: Path, tiny_teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Of an unbroken run in a folder."""
    whole = tmp_path_factory.mktemp("whole") / "c"
    precompute(PrecomputeConfig(**settings(photos, tiny_teacher, str(whole), **SMALL)))
    return cache_digest(whole)


def command(photos: Path, teacher: Path, cache: str) -> list[str]:
    return as_command("precompute", settings(photos, teacher, cache, **SMALL))


def be_quick() -> None:
    """As many tries as a bad network needs, without the pauses."""
    remote_files.RETRY = RetryPolicy(
        tries=8, first_pause_seconds=0.001, longest_pause_seconds=0.002, answer_seconds=1.0
    )


def require_no_secret(cache: str, *said: bytes) -> None:
    files = open_files(cache)
    keys = files.list()
    assert keys
    for text in (*said, *(files.read(key) for key in keys)):
        assert SECRET not in text


def test_two_processes_on_a_bad_network_make_the_same_cache(
    proxy: FaultProxy, photos: Path, tiny_teacher: Path, tmp_path: Path, digest: str
) -> None:
    """One request in ten fails, in one way or another: claims, chunks, commits, manifest."""
    faults = [Fault("refuse", 500, "InternalError"), refusal(503, "SlowDown"), refusal(504, "Gateway Timeout")]
    faults += [Fault("drop"), Fault("lose"), Fault("cut"), Fault("truncate"), Fault("stall", seconds=2.0)]
    cache = f"s3://caches/{uuid.uuid4()}/f8k.cache"
    proxy.seeded(5, 0.1, faults, most_in_a_row=3)
    # all of it: the server that forks the processes may have been started before there was a proxy
    environment = proxy.front().environment
    outs = [tmp_path / f"{number}.json" for number in range(2)]
    started = [
        start(
            settings(photos, tiny_teacher, cache, **SMALL),
            out=out,
            teacher_seconds=0.05,
            environment=environment,
            setup=be_quick,
        )
        for out in outs
    ]
    ended = [finish(process, out, 300) for process, out in zip(started, outs, strict=True)]
    assert [end.get("error") for end in ended] == [None, None]
    assert sum(end["result"]["chunks_encoded"] for end in ended) == CHUNKS
    assert {fault for _, fault in proxy.injected} == set(faults)
    proxy.plan = lambda request: None
    assert verify_cache(cache).ok
    assert cache_digest(cache) == digest


def test_a_store_that_goes_away_is_given_up_with_its_key_and_gone_on_with_later(
    proxy: FaultProxy, photos: Path, tiny_teacher: Path, digest: str
) -> None:
    cache = f"s3://caches/{uuid.uuid4()}/f8k.cache"
    commits: list[str] = []

    def go_away(request: Request) -> Fault | None:
        if request.method == "PUT" and "/commits/" in request.key:
            commits.append(request.key)
        return refusal(503, "ServiceUnavailable", "away") if len(commits) > 3 else None

    proxy.plan = go_away
    done = subprocess.run(command(photos, tiny_teacher, cache), capture_output=True, timeout=300)
    assert done.returncode == 1
    said = done.stderr.decode()
    assert "Traceback" not in said
    last = said.strip().splitlines()[-1]
    assert re.match(rf"error: {cache}: cannot (write|create|read|list|delete|look at) \S+: 6 tries failed, ", last), (
        said
    )
    assert last.endswith(". Run the same command again when the store answers. What is committed stays."), said
    assert "try 2 of 6" in said  # each further try is told
    proxy.plan = lambda request: None
    assert count_committed(cache) == (3, CHUNKS)
    assert {finding.kind for finding in verify_cache(cache).findings} == {"incomplete"}
    again = subprocess.run(command(photos, tiny_teacher, cache), capture_output=True, timeout=300)
    assert again.returncode == 0, again.stderr
    assert f"{CHUNKS - 3} of {CHUNKS} chunks encoded by this run" in again.stdout.decode()
    assert cache_digest(cache) == digest
    require_no_secret(cache, done.stdout, done.stderr, again.stdout, again.stderr)


@pytest.mark.parametrize("object_store", ["seaweedfs"], indirect=True)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "SIGINT"])
def test_stopped_by_a_signal_it_says_how_to_go_on(
    object_store: ObjectStore, photos: Path, tiny_teacher: Path, digest: str, number: signal.Signals
) -> None:
    cache = object_store.location(f"{uuid.uuid4()}/f8k.cache")
    process = subprocess.Popen(command(photos, tiny_teacher, cache), stderr=subprocess.PIPE)
    until = time.monotonic() + 120
    while process.poll() is None and not _some_committed(cache):
        assert time.monotonic() < until
        time.sleep(0.01)
    os.kill(process.pid, number)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 1, said
    found = re.search(rb"stopped: (\d+) of 30 chunks are committed\. Run the same command again to go on\.\n$", said)
    assert found, said
    assert 0 < int(found[1]) == count_committed(cache)[0] < CHUNKS
    assert {finding.kind for finding in verify_cache(cache).findings} == {"incomplete"}
    # all are given back, but for one whose request was under way: it may arrive after its process
    assert len(open_files(cache).list("claims")) <= 1
    again = subprocess.run(command(photos, tiny_teacher, cache), capture_output=True, timeout=300)
    assert again.returncode == 0, again.stderr
    assert cache_digest(cache) == digest
    require_no_secret(cache, said, again.stdout, again.stderr)


def _some_committed(cache: str) -> bool:
    try:
        return count_committed(cache)[0] > 0
    except CacheNotFoundError:
        return False
