"""Two hosts, with clocks seven minutes ahead and behind, write one cache: in a shared folder, and on S3 over links."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from teacher_cache.storage.check.verify import verify_cache
from teacher_cache.storage.files.claim_records import BEATS_MISSED, CLAIMS
from teacher_cache.storage.files.location import open_files
from tests.conftest import cache_digest, write_photos
from tests.object_store import start_seaweedfs
from tests.pipeline.precompute.conftest import settings
from tests.precompute_process import Event, finish, start
from tests.two_hosts import BEAT_SECONDS, Host, Run, two_hosts

pytestmark = pytest.mark.service

CHUNKS = 4 + 8  # 16 images and 32 captions by 4
PASSES = 2 * CHUNKS
SLOW = 2.0  # seconds of a pass: what a host has claimed takes it longer than a lease
LEASE_SECONDS = BEATS_MISSED * BEAT_SECONDS


@dataclass
class Work:
    """One cache of both hosts."""

    ahead: Host
    behind: Host
    config: dict[str, Any]
    environment: dict[str, str]
    folder: Path
    digest: str

    @property
    def cache(self) -> str:
        return str(self.config["cache"])

    @property
    def in_a_write(self) -> Event:
        """Between the objects of a chunk."""
        return ("before put" if "://" in self.cache else "written", "targets.zarr/text/norm/c")

    def start(self, host: Host, **options: Any) -> Run:
        return host.start(self.config, self.folder / host.name, environment=self.environment, **options)

    def claims(self, of: str = "") -> list[str]:
        """Keys of the claims on chunks; of those that took over, with ``.1``."""
        keys = open_files(self.cache).list(CLAIMS)
        return [key for key in keys if key.startswith((f"{CLAIMS}/image", f"{CLAIMS}/text")) and of in key]

    def check(self) -> None:
        """Sealed, sound, and byte for byte what one host makes."""
        for half_written in Path(self.cache).rglob(".partial-*"):
            half_written.unlink()  # by the host that lost its power: no other can tell, and gc waits for a day
        assert verify_cache(self.cache).ok
        assert cache_digest(self.cache) == self.digest
        assert self.claims() == []


@pytest.fixture(params=["folder", "s3"])
def work(
    request: pytest.FixtureRequest, tiny_teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Work]:
    config = settings(write_photos(tmp_path / "photos", 16), tiny_teacher, tmp_path / "alone.cache", batch_size=2)
    config |= {"chunk_rows": 4, "decode_threads": 1}
    out = tmp_path / "alone.json"
    assert "error" not in finish(start(config, out=out), out)
    digest = cache_digest(config["cache"])
    with two_hosts() as (address, ahead, behind):
        if request.param == "folder":
            yield Work(ahead, behind, config | {"cache": str(tmp_path / "c.cache")}, {}, tmp_path, digest)
            return
        with start_seaweedfs(tmp_path / "weed", address) as store:
            for name, value in store.environment.items():
                monkeypatch.setenv(name, value)
            cache = {"cache": store.location("c.cache")}
            yield Work(ahead, behind, config | cache, store.environment, tmp_path, digest)


def wait_for(run: Run, condition: Any) -> None:
    until = time.monotonic() + 120
    while not condition():
        assert run.process.poll() is None, run.said
        assert time.monotonic() < until, run.said
        time.sleep(0.05)


def test_both_write_it_and_no_living_claim_is_taken(work: Work) -> None:
    """The slow one works on its claims for longer than a lease, while the fast one waits for them."""
    slow = work.start(work.ahead, teacher_seconds=SLOW)
    wait_for(slow, work.claims)
    fast = work.start(work.behind)
    ended = [run.result() for run in (slow, fast)]
    assert sum(end["chunks_encoded"] for end in ended) == CHUNKS
    assert slow.passes + fast.passes == PASSES
    assert min(slow.passes, fast.passes) > 0
    work.check()


def test_claims_of_a_host_that_lost_its_power_are_taken_over_after_the_lease(work: Work) -> None:
    lost = work.start(work.ahead, stop_at=work.in_a_write)
    lost.wait_until_stopped()
    work.ahead.kill()
    assert work.claims(), "it held nothing when it died"
    other = work.start(work.behind, teacher_seconds=0.3)
    wait_for(other, lambda: other.passes)
    began = time.monotonic()
    wait_for(other, lambda: work.claims(".1."))
    # it looks at the claims of others when there is nothing else to do, for the time of a lease
    assert time.monotonic() - began > LEASE_SECONDS - BEAT_SECONDS
    other.result()
    assert other.passes <= PASSES
    work.check()


@pytest.mark.parametrize("work", ["s3"], indirect=True)
def test_one_whose_link_is_cut_in_a_write_comes_back_after_the_seal_and_changes_nothing(work: Work) -> None:
    cut = work.start(work.ahead, stop_at=work.in_a_write)
    cut.wait_until_stopped()
    work.ahead.set_link("down")
    cut.go_on()
    sealed = work.start(work.behind).result()
    work.ahead.set_link("up")
    late = cut.result()
    assert late["manifest_digest"] == sealed["manifest_digest"]
    assert "were committed by another process first" in cut.said
    assert "tries failed" not in cut.said
    work.check()


@pytest.mark.parametrize("work", ["s3"], indirect=True)
def test_a_link_that_is_down_for_seconds_costs_no_work(work: Work) -> None:
    run = work.start(work.behind, stop_at=work.in_a_write)
    run.wait_until_stopped()
    work.behind.set_link("down")
    run.go_on()
    time.sleep(5)
    work.behind.set_link("up")
    assert run.result()["chunks_encoded"] == CHUNKS
    assert run.passes == PASSES
    work.check()
