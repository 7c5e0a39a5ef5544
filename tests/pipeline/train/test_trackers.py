"""``--report-to``: each tracker in truth and offline, and what happens where one is missing, unreachable or fails."""

from __future__ import annotations

import logging
import os
import re
import signal
import sqlite3
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import mlflow
import pytest
from wandb.proto import wandb_internal_pb2

from teacher_cache.pipeline.models.run_folder import RunFolder
from teacher_cache.pipeline.train.loop import train
from tests.commands import run_command
from tests.object_store import free_ports
from tests.pipeline.train.train_work import make_student, trace, train_config
from tests.python_packages import install_beside

# MLflow uses what other packages have deprecated
pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning:mlflow", "ignore::sqlalchemy.exc.SADeprecationWarning"
)

SCALARS = ("loss", "learning_rate", "grad_norm", "logit_scale")


@pytest.fixture
def student(tmp_path: Path) -> Path:
    return make_student(tmp_path / "student.json")


@pytest.fixture
def mlflow_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    monkeypatch.setenv("MLFLOW_EXPERIMENT_ID", "")
    monkeypatch.delenv("MLFLOW_EXPERIMENT_ID")  # set_experiment sets it for the whole process
    monkeypatch.setattr(mlflow.tracking.fluent, "_active_experiment_id", None)
    return uri


def test_a_run_of_somebody_else_brings_no_name_into_queries_and_paths(tmp_path: Path) -> None:
    for name in ("' OR tags.`x` != '", "../../x", "é" * 9, ""):
        (tmp_path / ".tracker-id").write_text(name)
        made = RunFolder(tmp_path).tracker_id()
        assert re.fullmatch("[0-9a-f]{16}", made)
        assert RunFolder(tmp_path).tracker_id() == made


def wandb_history(run: Path) -> list[dict[str, float]]:
    """Lines of the history in wandb's offline file: records of protobuf in the log format of LevelDB."""
    (file,) = (run / "wandb").glob("offline-run-*/*.wandb")
    data, at, whole, lines = file.read_bytes(), 7, b"", []
    while at + 7 <= len(data):
        if 32_768 - at % 32_768 < 7:
            at += 32_768 - at % 32_768
            continue
        _, size, kind = struct.unpack("<IHB", data[at : at + 7])
        whole += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # a whole record, or the last part of one
            record = wandb_internal_pb2.Record.FromString(whole)
            whole = b""
            if record.WhichOneof("record_type") == "history":
                lines.append({item.key or item.nested_key[0]: float(item.value_json) for item in record.history.item})
    return lines


def test_wandb_offline_has_every_step(
    photo_cache: Path,
    student: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    train(train_config(photo_cache, student, tmp_path / "run", report_to="wandb"))
    logged, until = trace(tmp_path / "run"), time.monotonic() + 60
    while len(history := wandb_history(tmp_path / "run")) < len(logged) and time.monotonic() < until:
        time.sleep(0.1)  # a process of wandb's own writes the file
    assert len(history) == len(logged) == 8
    for line, step in zip(history, logged, strict=True):
        assert [line["_step"], *(line[name] for name in SCALARS)] == pytest.approx(
            [step["step"], *(step[name] for name in SCALARS)]
        )
    assert not (tmp_path / "run" / "tensorboard").exists()
    assert capsys.readouterr().out == ""  # stdout is for the result


def test_mlflow_has_every_step_once_where_the_run_was_killed(
    photo_cache: Path, student: Path, tmp_path: Path, mlflow_store: str
) -> None:
    """Killed by SIGKILL in the second epoch and resumed: one run in MLflow, with the values of log.jsonl."""
    config = train_config(photo_cache, student, tmp_path / "run", report_to="mlflow", epochs=3)
    code = (
        "import os, signal, sys; from teacher_cache.pipeline.train.loop import train;"
        "from teacher_cache.pipeline.settings.train import TrainConfig;"
        "train(TrainConfig.model_validate_json(sys.argv[1]),"
        " lambda at: at.step == 6 and os.kill(os.getpid(), signal.SIGKILL))"
    )
    killed = subprocess.run([sys.executable, "-c", code, config.model_dump_json()], check=False)
    assert killed.returncode == -signal.SIGKILL
    train(config, resume=True)
    client = mlflow.MlflowClient(mlflow_store)
    (experiment,) = (found for found in client.search_experiments() if found.name == "teacher-cache")
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED"
    assert run.data.params["student"] == str(student)
    assert run.data.params["cache_manifest_digest"] == RunFolder(tmp_path / "run").read().cache_manifest_digest
    for name in SCALARS:
        points = {point.step: point.value for point in client.get_metric_history(run.info.run_id, name)}
        assert points == pytest.approx({line["step"]: line[name] for line in trace(tmp_path / "run")}, rel=1e-6)


def test_a_tracker_that_fails_later_is_left_out(
    photo_cache: Path,
    student: Path,
    tmp_path: Path,
    mlflow_store: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def away(*_: Any, **__: Any) -> None:
        raise ConnectionError("the server went away.\nTraceback of three hundred lines")

    monkeypatch.setattr(mlflow, "log_metrics", away)
    train(train_config(photo_cache, student, tmp_path / "run", report_to=("mlflow", "tensorboard")))
    mlflow.end_run()
    said = "report_to mlflow: ConnectionError: the server went away. The run goes on without it; log.jsonl has all"
    warned = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert [record.getMessage() for record in warned if record.name == "teacher_cache.train"] == [said]
    assert RunFolder(tmp_path / "run").read().finished
    assert list((tmp_path / "run" / "tensorboard").iterdir())


def test_one_that_cannot_begin_ends_the_run_before_its_first_step(
    photo_cache: Path, student: Path, tmp_path: Path
) -> None:
    """In a process of its own: wandb reads its settings once."""
    config = train_config(photo_cache, student, tmp_path / "run", report_to="wandb")
    code = (
        "import sys; from teacher_cache.pipeline.train.loop import train;"
        "from teacher_cache.pipeline.settings.train import TrainConfig;"
        "train(TrainConfig.model_validate_json(sys.argv[1]))"
    )
    environment = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    environment |= {"WANDB_MODE": "online", "HOME": str(tmp_path)}
    command = [sys.executable, "-c", code, config.model_dump_json()]
    told = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert "UsageError: report_to wandb: UsageError: No API key configured" in told.stderr
    assert "WANDB_MODE=offline" in told.stderr
    assert not (tmp_path / "run" / "log.jsonl").exists()
    train(config.model_copy(update={"report_to": ()}))  # the folder is not spoiled
    assert RunFolder(tmp_path / "run").read().finished


@pytest.mark.skipif(find_spec("trackio") is not None, reason="trackio is installed")
def test_a_package_that_is_missing_is_named_before_anything_is_written(photo_cache: Path, tmp_path: Path) -> None:
    told = run_command("train", "--cache", photo_cache, "--student", "vit-s-32", "--out", tmp_path / "r",
                       "--report-to", "tensorboard,trackio")  # fmt: skip
    assert told.returncode == 2
    assert told.stderr.startswith("error: report_to trackio needs trackio, which is not installed: ")
    assert told.stderr.endswith("pip install trackio\n")
    assert not (tmp_path / "r").exists()


def test_a_wrong_name_lists_the_trackers(tmp_path: Path) -> None:
    told = run_command("train", "--cache", "c", "--student", "vit-s-32", "--out", tmp_path, "--report-to", "tensorbord")
    assert told.returncode == 2
    for name in ("--report-to", "'tensorbord'", "'tensorboard'", "'wandb'", "'mlflow'", "'trackio'"):
        assert name in told.stderr


def test_trackio_has_every_step(photo_cache: Path, student: Path, tmp_path: Path) -> None:
    """The real package in a folder of its own: it wants an older Pillow."""
    install_beside(tmp_path / "packages", "trackio", "gradio-client", "brotli", "orjson", "python-multipart")
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([*sys.path, str(tmp_path / "packages")]),
        "TRACKIO_DIR": str(tmp_path / "trackio"),
    }
    flags = ("--epochs", "2", "--batch-size", "8", "--device", "cpu", "--set", "workers=0", "--report-to", "trackio")
    words = ("--cache", photo_cache, "--student", student, "--out", tmp_path / "run", *flags, "--json")
    command = [sys.executable, "-m", "teacher_cache.pipeline.cli.app", "train", *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("{")
    with sqlite3.connect(tmp_path / "trackio" / "teacher-cache.db") as database:
        rows = database.execute("SELECT step, json_extract(metrics, '$.loss') FROM metrics ORDER BY step").fetchall()
    losses = {step: loss for step, loss in rows if loss is not None}
    assert losses == pytest.approx({line["step"]: line["loss"] for line in trace(tmp_path / "run")}, rel=1e-6)


@pytest.fixture
def mlflow_page(mlflow_store: str, tmp_path: Path) -> Iterator[str]:
    """MLflow's own server with its pages; the package for clients has none."""
    same = version("mlflow-skinny")
    ours = ("graphene", "graphql-core<3.3", "graphql-relay", "huey", "gunicorn<27", "skops", "prettytable")
    install_beside(tmp_path / "packages", f"mlflow=={same}", f"mlflow-tracing=={same}", *ours)
    (port,) = free_ports(1)
    command = [sys.executable, "-m", "mlflow", "ui", "--backend-store-uri", mlflow_store, "--host", "127.0.0.1",
               "--port", str(port), "--workers", "1"]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "packages")}
    log = tmp_path / "mlflow.log"
    with log.open("w") as file:
        server = subprocess.Popen(command, stdout=file, stderr=file, env=environment, start_new_session=True)
    try:
        for _ in range(300):
            if server.poll() is not None or "Application startup complete" in log.read_text():
                break
            time.sleep(1)
        assert server.poll() is None, log.read_text()
        yield f"http://127.0.0.1:{port}"
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait(30)


def test_the_run_is_seen_in_mlflows_pages(
    photo_cache: Path, student: Path, tmp_path: Path, mlflow_page: str, browser: Any
) -> None:
    train(train_config(photo_cache, student, tmp_path / "seen", report_to="mlflow"))
    (run,) = mlflow.search_runs(experiment_names=["teacher-cache"], output_format="list")
    page = browser.new_page()
    page.goto(f"{mlflow_page}/#/experiments/{run.info.experiment_id}/runs/{run.info.run_id}/model-metrics")
    for text in (str(run.info.run_name), "cosine", "interactive", "relational"):  # the title, and titles of charts
        page.wait_for_function("text => document.body.innerText.includes(text)", arg=text, timeout=120_000)
    page.close()
