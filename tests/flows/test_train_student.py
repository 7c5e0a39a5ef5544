"""Which runs the flow goes on with, without a server."""

from __future__ import annotations

import contextlib
import json
import logging
from pathlib import Path
from types import SimpleNamespace

import pytest

from teacher_cache.flows import serve
from teacher_cache.flows.retrain_student import retrain_student
from teacher_cache.flows.train_student import evaluate_config, goes_on, train_student
from teacher_cache.pipeline.settings.evaluate import EvaluateConfig
from teacher_cache.pipeline.train.loop import train
from teacher_cache.storage.observe.logs import JsonFormatter
from tests.pipeline.train.train_work import make_cache, make_student, train_config


class Seen(Exception): ...


def test_events_of_a_flow_run_have_its_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def tell(*_: object) -> None:
        raise Seen(json.loads(JsonFormatter().format(logging.makeLogRecord({"msg": "at work"})))["run"])

    monkeypatch.setenv("PREFECT__RUNTIME__FLOW_RUN__NAME", "brisk-owl")
    no_progress = contextlib.nullcontext()
    monkeypatch.setattr("teacher_cache.flows.train_student.progress_artifact", lambda *_: no_progress)
    monkeypatch.setattr("teacher_cache.flows.train_student.train_run", SimpleNamespace(with_options=lambda **_: tell))
    monkeypatch.setattr("teacher_cache.flows.retrain_student.look", lambda _: SimpleNamespace(judged=None))
    monkeypatch.setattr("teacher_cache.flows.retrain_student.encode", tell)
    settings = {"student": "s", "device": "cpu"}
    with pytest.raises(Seen, match="brisk-owl"):
        train_student.fn(cache="c", out=str(tmp_path / "run"), **settings)
    of_retraining = {"dataset": "scenes:s", "teacher": "t", "home": str(tmp_path), "train": {}, "split": "train"}
    with pytest.raises(Seen, match="brisk-owl"):
        retrain_student.fn(**of_retraining, **settings)


def test_a_large_batch_of_training_is_none_of_the_evaluation(tmp_path: Path) -> None:
    """8,192 at once fit where they are learned from in parts, and not in one pass."""
    config = train_config(tmp_path / "c", "vit-s-32", tmp_path / "run", batch_size=8192, micro_batch=128)
    assert evaluate_config(config, "test", "last").batch_size == EvaluateConfig.model_fields["batch_size"].default


def test_serve_takes_nothing_over_from_another_prefect(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Its database among it, in which runs would be marked as crashed."""
    monkeypatch.setenv("PREFECT_SERVER_DATABASE_CONNECTION_URL", "postgresql+asyncpg://x:y@team/prefect")
    monkeypatch.setenv("PREFECT_API_AUTH_STRING", "a:b")
    monkeypatch.setenv("PREFECT_PROFILE", "team")
    monkeypatch.setenv("PREFECT_LOGGING_LEVEL", "DEBUG")
    found = serve._environment(tmp_path, "http://127.0.0.1:1/api", 1)
    assert "team" not in " ".join(found.values())
    assert "PREFECT_API_AUTH_STRING" not in found
    assert (found["PREFECT_LOGGING_LEVEL"], found["PREFECT_HOME"]) == ("DEBUG", str(tmp_path))


class WorkerDied(Exception): ...


def test_a_run_whose_worker_died_is_gone_on_with_and_a_finished_one_is_not(tiny_teacher: Path, tmp_path: Path) -> None:
    config = train_config(make_cache(tmp_path, tiny_teacher), make_student(tmp_path / "s.json"), tmp_path / "run")
    assert not goes_on(config.out, 1)
    assert not goes_on(config.out, 2)  # the first try came to nothing at all

    def die(at):
        if at.step == 6:
            raise WorkerDied

    with pytest.raises(WorkerDied):
        train(config, die)
    assert goes_on(config.out, 1)
    record = train(config, resume=goes_on(config.out, 1)).record
    assert record.resumed_at == (4,)
    assert record.steps == 8
    assert not goes_on(config.out, 1)
    # the flow run that trained it is tried again, for its evaluation
    assert goes_on(config.out, 2)
    assert train(config, resume=True).record == record
