"""A fan-out over Ray: workers and nodes are lost, others join; the cache is the one that this process alone makes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from teacher_cache.pipeline.precompute.executors import LocalExecutor, open_executor
from teacher_cache.pipeline.settings.precompute import PrecomputeConfig
from teacher_cache.storage.check.verify import verify_cache
from teacher_cache.storage.errors import UsageError
from teacher_cache.storage.files.claim_records import CLAIMS
from teacher_cache.storage.files.location import open_files
from tests.conftest import cache_digest, write_photos
from tests.object_store import ObjectStore
from tests.pipeline.precompute.ray_work import BATCH, CHUNK, CHUNKS, IMAGES, IN_FLIGHT, PASSES, POISON, run

needs_ray = pytest.mark.skipif(
    find_spec("ray") is None, reason="ray is not installed: pip install 'teacher-cache[ray]'"
)


def settings(**others: Any) -> PrecomputeConfig:
    return PrecomputeConfig(dataset="flickr:/nowhere", teacher="bundled:scenes", cache="/nowhere/c", **others)


@pytest.fixture(scope="module")
def found(
    seaweedfs: ObjectStore, tiny_teacher: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, Any]]:
    """What all runs on one cluster came to; a cluster takes long to start."""
    folder = tmp_path_factory.mktemp("ray")
    photos = write_photos(folder / "photos", IMAGES)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in seaweedfs.environment.items():
            patch.setenv(name, value)
        runs = ("plain", "killed", "node_lost", "poisoned", "refused")
        yield {"root": seaweedfs.location("ray"), **run(photos, tiny_teacher, folder / "work", seaweedfs, runs)}


def check_whole(found: dict[str, Any], location: str) -> None:
    assert cache_digest(location) == found["local"]["digest"]
    report = verify_cache(location)
    assert report.ok, report.findings
    assert open_files(location).list(CLAIMS) == []


def on_a_cluster(test: Callable[..., None]) -> Callable[..., None]:
    # the time is of the first one, for a machine under load: it starts a cluster and a dozen processes
    return needs_ray(pytest.mark.service(pytest.mark.timeout(1200)(test)))


@on_a_cluster
def test_the_local_run_did_not_import_ray(found: dict[str, Any]) -> None:
    assert found["local"]["ray"] is False


@on_a_cluster
def test_the_cache_is_that_of_a_local_run(found: dict[str, Any]) -> None:
    plain = found["plain"]
    assert plain["digest"] == found["local"]["digest"]
    assert plain["encoded"] == CHUNKS
    assert plain["images"][-1] == IMAGES
    assert plain["images"] == sorted(plain["images"])
    assert plain["handler_kept"]


@on_a_cluster
def test_a_killed_workers_chunks_are_done_by_others_and_no_committed_one_twice(found: dict[str, Any]) -> None:
    killed = found["killed"]
    assert "error" not in killed, killed
    assert str(killed["victim"]) in killed["commits"]
    done = [name for names in killed["commits"].values() for name in names]
    assert len(done) == len(set(done))
    assert CHUNKS - IN_FLIGHT <= len(done) <= CHUNKS  # the victim may have died before it wrote down a commit
    assert PASSES <= killed["passes"] <= PASSES + IN_FLIGHT * CHUNK // BATCH
    assert killed["encoded"] == killed["chunks"] == CHUNKS
    check_whole(found, f"{found['root']}/killed")


@on_a_cluster
def test_a_lost_node_is_made_up_for_and_a_new_one_joins_in(found: dict[str, Any]) -> None:
    lost = found["node_lost"]
    assert "error" not in lost, lost
    assert len(lost["before"]) == 2
    late = [pid for pid in lost["commits"] if int(pid) not in lost["before"]]
    assert len(late) == 1
    assert lost["commits"][late[0]], "the new node's worker did nothing"
    assert lost["encoded"] == lost["chunks"] == CHUNKS
    check_whole(found, f"{found['root']}/node-lost")


@on_a_cluster
def test_a_chunk_that_ends_worker_after_worker_is_named_and_stops_the_run(found: dict[str, Any]) -> None:
    poisoned = found["poisoned"]
    assert poisoned["error"].startswith(f"ChildProcessError: chunk {POISON} ended 3 workers one after another")
    done = [name for names in poisoned["commits"].values() for name in names]
    assert len(done) == len(set(done)) == CHUNKS - 1
    assert POISON not in done


@on_a_cluster
def test_an_error_that_would_come_again_stops_the_run_as_it_is(found: dict[str, Any]) -> None:
    refused = found["refused"]
    assert refused["error"].startswith("CacheMismatchError: ")
    assert "0007.jpg: not the image that the cache was made of" in refused["error"]
    assert "(a worker on " in refused["error"]


@on_a_cluster
def test_no_credential_is_in_what_the_driver_says(found: dict[str, Any], seaweedfs: ObjectStore) -> None:
    assert seaweedfs.environment["AWS_SECRET_ACCESS_KEY"] not in found["stderr"]


def test_local_is_the_default() -> None:
    assert isinstance(open_executor(settings()), LocalExecutor)


def test_workers_without_a_cluster_are_refused() -> None:
    with pytest.raises(UsageError, match="--workers 3 needs --executor ray"):
        open_executor(settings(workers=3))


@pytest.mark.parametrize("name", ["", "dask", "rays", "ray:1", "LOCAL"])
def test_an_unknown_executor_is_refused_with_the_known_ones(name: str) -> None:
    with pytest.raises(UsageError, match=rf"executor '{name}' is not known; use local, ray or ray://HOST:PORT"):
        open_executor(settings(executor=name))


def test_ray_that_is_not_installed_is_said_so(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.delitem(sys.modules, "teacher_cache.pipeline.precompute.ray_executor", raising=False)
    for name in [name for name in sys.modules if name.partition(".")[0] == "ray"]:
        monkeypatch.delitem(sys.modules, name)

    class Missing:
        def find_spec(self, name: str, *others: Any) -> None:
            if name == "ray":
                raise ModuleNotFoundError("No module named 'ray'", name="ray")

    monkeypatch.setattr(sys, "meta_path", [Missing(), *sys.meta_path])
    with pytest.raises(UsageError, match=r"needs ray, which is not installed: .*pip install .*\[ray\]'"):
        open_executor(settings(executor="ray"))
