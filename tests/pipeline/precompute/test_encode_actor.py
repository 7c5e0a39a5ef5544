"""Actors of a Ray cluster: their errors go to another process, and nothing of them may be lost on the way."""

from __future__ import annotations

import errno
import os
import pickle
import socket
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import torch

from teacher_cache.pipeline.models.teacher import load_teacher
from teacher_cache.pipeline.precompute.plan import plan_precompute
from teacher_cache.pipeline.settings.precompute import PrecomputeConfig
from teacher_cache.storage.errors import CacheMismatchError, CacheUnreachableError
from teacher_cache.storage.observe.telemetry import METRICS_PORT
from teacher_cache.storage.write.writer import EmbeddingWriter
from tests.conftest import make_model_folder, write_photos
from tests.pipeline.precompute.conftest import make_config

pytest.importorskip("ray", reason="ray is not installed: pip install 'teacher-cache[ray]'")
from teacher_cache.pipeline.precompute import ray_executor
from teacher_cache.pipeline.precompute.ray_executor import EncodeActor, Outcome


class NotPortable(Exception):
    def __init__(self, first: str, second: str) -> None:
        super().__init__(f"{first} and {second}")


@pytest.fixture
def config(tiny_teacher: Path, tmp_path: Path) -> PrecomputeConfig:
    photos = write_photos(tmp_path / "photos", 8)
    config = make_config(photos, tiny_teacher, tmp_path / "c", batch_size=None, chunk_rows=4, decode_threads=1)
    plan_precompute(config, load_teacher(config.teacher, device="cpu"))
    return config


def started(config: PrecomputeConfig, monkeypatch: pytest.MonkeyPatch) -> EncodeActor:
    monkeypatch.chdir(Path.cwd())  # the actor goes where the run was started
    actor = EncodeActor()
    assert actor.start(config, str(Path.cwd())) == Outcome()
    return actor


def test_it_encodes_what_is_left(config: PrecomputeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    actor, refs = started(config, monkeypatch), EmbeddingWriter(config.cache).pending()
    assert actor.encode(refs[:3]) == Outcome(encoded=frozenset(refs[:3]))
    assert actor.encode(refs[2:5]) == Outcome(encoded=frozenset(refs[3:5]))
    assert EmbeddingWriter(config.cache).pending() == refs[5:]


def test_it_serves_what_it_does(config: PrecomputeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the driver's port plus its number."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    monkeypatch.setenv(METRICS_PORT, "")  # and is restored
    actor, refs = EncodeActor(), EmbeddingWriter(config.cache).pending()
    monkeypatch.chdir(Path.cwd())
    assert actor.start(config, str(Path.cwd()), 3, {METRICS_PORT: str(port - 3)}) == Outcome()
    encode, told = ray_executor.encode_claimed, list[str]()

    def asked(*arguments: Any) -> Any:
        encoded = encode(*arguments)
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as answer:
            told.append(answer.read().decode())
        return encoded

    monkeypatch.setattr(ray_executor, "encode_claimed", asked)
    assert actor.encode(refs[:1]) == Outcome(encoded=frozenset(refs[:1]))
    assert 'teacher_cache_rows_total{tower="image"} 4.0' in told[0]


def test_a_cache_of_another_teacher_is_refused_at_the_start(config: PrecomputeConfig, tmp_path: Path) -> None:
    other = make_model_folder(tmp_path / "other", seed=1)
    outcome = EncodeActor().start(config.model_copy(update={"teacher": f"local-dir:{other}"}), str(Path.cwd()))
    assert isinstance(outcome.error, CacheMismatchError)
    assert "weights_sha256" in str(outcome.error)
    assert not outcome.transient


@pytest.mark.parametrize(
    ("error", "kind", "transient"),
    [
        (CacheUnreachableError("no answer"), CacheUnreachableError, True),
        (OSError(errno.ENOSPC, "No space left on device"), OSError, False),
        (NotPortable("this", "that"), OSError, False),
    ],
    ids=lambda value: type(value).__name__,
)
def test_an_error_survives_the_way_to_the_driver(
    config: PrecomputeConfig,
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
    kind: type[Exception],
    transient: bool,
) -> None:
    actor, refs = started(config, monkeypatch), EmbeddingWriter(config.cache).pending()

    def fail(*others: object) -> None:
        raise error

    monkeypatch.setattr("teacher_cache.pipeline.precompute.ray_executor.encode_claimed", fail)
    outcome: Outcome = pickle.loads(pickle.dumps(actor.encode(refs)))
    assert type(outcome.error) is kind
    assert str(error) in str(outcome.error)
    assert outcome.transient is transient
    assert getattr(outcome.error, "errno", None) == getattr(error, "errno", None)


def test_a_broken_gpu_ends_its_actor_alone(config: PrecomputeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA can do nothing more in that process. The driver gives the chunks of a lost actor to others."""
    actor, refs = started(config, monkeypatch), EmbeddingWriter(config.cache).pending()

    def fail(*others: object) -> None:
        raise torch.AcceleratorError("CUDA error: uncorrectable ECC error encountered")

    def ended(code: int) -> None:
        raise SystemExit(code)

    monkeypatch.setattr("teacher_cache.pipeline.precompute.ray_executor.encode_claimed", fail)
    monkeypatch.setattr(os, "_exit", ended)
    with pytest.raises(SystemExit, match="1"):
        actor.encode(refs)
