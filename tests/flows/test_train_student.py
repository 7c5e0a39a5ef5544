"""Which runs the flow goes on with, without a server."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from types import SimpleNamespace

import pytest

from flows.retrain_student import retrain_student
from flows.train_student import goes_on, train_student
from pipeline.train import train
from storage.logs import JsonFormatter
from tests.pipeline.train_work import make_cache, make_student, train_config


class Seen(Exception): ...


def test_events_of_a_flow_run_have_its_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def tell(*_: object) -> None:
        raise Seen(json.loads(JsonFormatter().format(logging.makeLogRecord({"msg": "at work"})))["run"])

    monkeypatch.setenv("PREFECT__RUNTIME__FLOW_RUN__NAME", "brisk-owl")
    monkeypatch.setattr("flows.train_student.start_progress", lambda *_: None)
    monkeypatch.setattr("flows.train_student.train_run", SimpleNamespace(with_options=lambda **_: tell))
    monkeypatch.setattr("flows.retrain_student.look", lambda _: SimpleNamespace(judged=None))
    monkeypatch.setattr("flows.retrain_student.encode", tell)
    settings = {"student": "s", "device": "cpu"}
    with pytest.raises(Seen, match="brisk-owl"):
        train_student.fn(cache="c", out=str(tmp_path / "run"), **settings)
    of_retraining = {"dataset": "scenes:s", "teacher": "t", "home": str(tmp_path), "train": {}, "split": "train"}
    with pytest.raises(Seen, match="brisk-owl"):
        retrain_student.fn(**of_retraining, **settings)


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
