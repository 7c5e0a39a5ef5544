"""Measuring and shipping a student, and what all flows leave to look at: a real server, a real worker."""

from __future__ import annotations

import base64
import contextvars
import io
import json
import sys
import threading
import time
import urllib.request
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image
from prefect import flow
from prefect.client.orchestration import get_client

from teacher_cache.flows.deploy_student import deploy_student
from teacher_cache.flows.devices import device_slots
from teacher_cache.flows.evaluate_student import evaluate_student
from teacher_cache.flows.precompute_teacher import precompute_teacher
from teacher_cache.flows.report_artifacts import leave_report
from teacher_cache.flows.train_student import train_student
from teacher_cache.pipeline.deploy.gates import require_parity
from teacher_cache.pipeline.deploy.table import StudentTable, to_markdown
from teacher_cache.pipeline.evaluate.retrieval import evaluate
from teacher_cache.pipeline.models.run_folder import RunFolder
from teacher_cache.pipeline.promote.registry import StudentRegistry
from teacher_cache.pipeline.settings.evaluate import EvaluateConfig
from teacher_cache.storage.errors import UsageError
from teacher_cache.storage.look.info import describe_cache
from tests.conftest import TINY_MODEL, write_photos

pytestmark = pytest.mark.service


def png(artifact):
    assert artifact["type"] == "image"
    head, _, data = artifact["data"].partition(",")
    assert head == "data:image/png;base64"
    with Image.open(io.BytesIO(base64.b64decode(data))) as image:
        image.load()
    return image.size


def test_a_cache_is_told_in_markdown(served, precomputed):
    left = served.artifact(precomputed.id, "precompute-teacher-report")
    assert left["type"] == "markdown"
    info = describe_cache(str(precomputed.path))
    assert info.identity_digest in left["data"]
    assert f"| dataset | `{info.dataset}`, 28 images, 84 captions |" in left["data"]
    assert "The teacher's own recall, 27 images" in left["data"]  # one of them is not an image


def test_training_moves_its_progress_and_tells_losses_and_what_was_kept(served, trained):
    progress = served.artifact(trained.id, "train-student-progress")
    record = RunFolder(trained.path).read()
    assert progress["data"] == 100.0
    assert progress["description"] == f"`{trained.path}`: all 4 steps, loss {record.epochs[-1].loss:.4f}"
    text = served.artifact(trained.id, "train-student-report")["data"]
    for epoch in record.epochs:
        assert f"| {epoch.loss:.4f} | " in text
    assert "| metric | teacher | student | retention [95 %] |" in text


def test_a_student_is_measured_again(served, trained):
    code, output, flow_run = served.run("evaluate-student/default", run=str(trained.path), device="cpu")
    assert code == 0, output + served.worker_log()
    assert served.task_names(flow_run) == ["evaluate", "report"]
    wanted = evaluate(EvaluateConfig(run=str(trained.path), split="test", device="cpu", workers=0))
    text = served.artifact(flow_run, "evaluate-student")["data"]
    span = wanted.retention_intervals.mean
    assert f"| {wanted.retention['mean']:.1f} % [{span.low:.1f}, {span.high:.1f}] |" in text
    for direction, recalls in wanted.student.items():
        for name, value in recalls.items():
            assert f"| {direction} {name} | {wanted.teacher[direction][name]:.1f} | {value:.1f} | " in text


@pytest.mark.parametrize("flow_name", ["precompute-teacher", "train-student"])
def test_the_main_chart_of_the_report_is_left_with_the_run(flow_name, served, request):
    for module in ("collect", "page", "charts"):
        pytest.importorskip(f"teacher_cache.pipeline.report.{module}")
    left = request.getfixturevalue("precomputed" if flow_name == "precompute-teacher" else "trained")
    width, height = png(served.artifact(left.id, f"{flow_name}-chart"))
    assert width > 300
    assert height > 100
    text = served.artifact(left.id, f"{flow_name}-report")["data"]
    page = left.path / "report.html" if flow_name == "train-student" else left.path.with_name("pictures.report.html")
    link = f"http://127.0.0.1:{served.port + 1}{page}"
    assert f"[Open the report]({link}), or on the worker's machine: `python3 -m webbrowser file://{page}`" in text
    with urllib.request.urlopen(link, timeout=30) as answer:
        assert answer.read() == page.read_bytes()


def deploy_parameters(run, out, teacher):
    """As quick as it gets."""
    return {
        "run": str(run),
        "out": str(out),
        "teacher": f"local-dir:{teacher}",
        "advanced": {"rounds": 1, "threads": 1, "calibration_images": 8, "max_recall_loss": 100.0},
    }


def test_a_student_is_shipped_with_its_table(served, trained, tiny_teacher):
    out = served.folder / "deployed"
    code, output, flow_run = served.run("deploy-student/default", **deploy_parameters(trained.path, out, tiny_teacher))
    assert code == 0, output + served.worker_log()
    assert served.task_names(flow_run) == ["deploy", "report"]
    text = served.artifact(flow_run, "deploy-student")["data"]
    table = StudentTable.model_validate_json((out / "table.json").read_bytes())
    assert to_markdown(table) in text
    assert len(table.gates) > 2
    for gate in table.gates:
        assert f"| {gate.name} | {gate.found:.6g} | " in text
    with Image.open(out / "table.png") as picture:
        assert png(served.artifact(flow_run, "deploy-student-chart")) == picture.size


def test_retraining_learns_what_is_new_and_does_nothing_where_nothing_is(served, tiny_teacher, tmp_path):
    write_photos(tmp_path / "photos", 32)
    (tmp_path / "student.json").write_text(json.dumps({**TINY_MODEL, "embed_dim": 12}))
    home = tmp_path / "home"
    settings = {
        "dataset": f"flickr:{tmp_path}/photos",
        "teacher": f"local-dir:{tiny_teacher}",
        "home": str(home),
        "student": str(tmp_path / "student.json"),
        "train": {"epochs": 1, "batch_size": 8, "workers": 0},
        "split": "train",
        "ship": False,
        "device": "cpu",
    }
    code, output, flow_run = served.run("retrain-student/default", **settings)
    assert code == 0, output + served.worker_log()
    assert sorted(served.task_names(flow_run)) == sorted(["look", "encode", "train", "promote", "report"])
    champion = StudentRegistry(f"{home}/students").champion()
    assert champion is not None
    text = served.artifact(flow_run, "retrain-student")["data"]
    assert text.startswith("# promoted")
    assert f"Student 1, `{home}/runs/0001`: the first" in text
    for direction, recalls in champion.recalls.items():
        for name, value in recalls.items():
            assert f"| {direction} {name} | {value:.1f} | - |" in text

    code, output, flow_run = served.run("retrain-student/default", **settings)
    assert code == 0, output + served.worker_log()
    assert sorted(served.task_names(flow_run)) == ["look", "report"]
    assert served.artifact(flow_run, "retrain-student")["data"].startswith("# nothing-new")
    assert [path.name for path in (home / "caches").iterdir()] == ["0001.cache"]


def test_a_file_that_fails_its_gate_fails_the_flow_and_is_not_tried_again(
    here, trained, tiny_teacher, tmp_path, monkeypatch
):
    monkeypatch.setattr("teacher_cache.pipeline.deploy.run.write_files", lambda *_: require_parity("image.onnx", 0.75))
    out = tmp_path / "deployed"
    state = deploy_student(**deploy_parameters(trained.path, out, tiny_teacher), return_state=True)
    flow_run = str(state.state_details.flow_run_id)
    reason = "image.onnx: differs from the model that it was made from: least cosine 0.7500000"
    assert reason in here.ask(f"flow_runs/{flow_run}")["state"]["message"]
    (task,) = here.ask("task_runs/filter", {"flow_runs": {"id": {"any_": [flow_run]}}})
    assert (task["name"], task["state"]["type"], task["run_count"]) == ("deploy", "FAILED", 1)
    assert not list(tmp_path.glob("*deployed*"))


def test_time_that_runs_out_ends_the_flow_and_leaves_nothing(here, monkeypatch, tmp_path):
    tries = []

    def slow(config, progress):
        tries.append(config.out)
        for _ in range(600):  # no one long sleep: Prefect interrupts between two steps of Python
            time.sleep(0.1)
        raise AssertionError("a minute later nobody had interrupted it")

    monkeypatch.setattr("teacher_cache.pipeline.deploy.run.deploy", slow)
    with pytest.raises(TimeoutError, match=r"0\.5 second"):
        deploy_student(run="r", out=str(tmp_path / "out"), advanced={"timeout_seconds": 0.5})
    assert tries == [str(tmp_path / "out")]


class Report:
    """Modules that stand for those of ``teacher_cache.pipeline.report``; what they are asked is noted."""

    def __init__(self, monkeypatch):
        self.asked = []
        self.chart = base64.b64decode(SMALL)
        modules = {
            "collect": {"collect_report": self.collect},
            "page": {"render_report": lambda data: f"<!doctype html>{data.name}"},
            "charts": {"main_chart_png": self.draw},
        }
        for name, content in modules.items():
            monkeypatch.setitem(sys.modules, f"teacher_cache.pipeline.report.{name}", SimpleNamespace(**content))

    def collect(self, location, runs, image_root, progress, **less):
        self.asked.append((location, list(runs), image_root, less))
        return SimpleNamespace(name="the page", recall="recall")

    def draw(self, data):
        if isinstance(self.chart, Exception):
            raise self.chart
        return self.chart


@flow(name="only-a-report")
def only_a_report(page):
    from prefect.runtime import flow_run

    return leave_report("only", "a.cache", page, ["runs/a"], "/images"), flow_run.id


def one_pixel():
    file = io.BytesIO()
    Image.new("RGB", (1, 1)).save(file, "PNG")
    return base64.b64encode(file.getvalue())


SMALL = one_pixel()


def test_the_report_is_written_and_its_chart_kept_by_the_server(here, tmp_path, monkeypatch):
    report = Report(monkeypatch)
    page = tmp_path / "run" / "report.html"
    left, flow_run = only_a_report(page)
    assert report.asked == [("a.cache", ["runs/a"], "/images", {"whole": True})]
    assert page.read_text() == "<!doctype html>the page"
    assert (left.collected, left.page, left.recall) == (True, str(page), "recall")
    kept = here.artifact(flow_run, "only-chart")
    assert kept["data"] == "data:image/png;base64," + SMALL.decode()
    assert kept["description"] == "`runs/a`"


def test_what_cannot_be_drawn_is_said_and_fails_nothing(here, tmp_path, monkeypatch):
    report = Report(monkeypatch)
    report.chart = RuntimeError("no such font")
    left, flow_run = only_a_report(tmp_path / "report.html")
    assert Path(left.page).exists()
    assert "no chart: RuntimeError: no such font" in here.until_logged(flow_run, "no chart")
    assert here.ask("artifacts/filter", {"flow_runs": {"id": {"any_": [flow_run]}}}) == []
    # a cache at a URL has no folder to write a page to
    report.chart = base64.b64decode(SMALL)
    left, flow_run = only_a_report(None)
    assert left.page is None
    assert report.asked[-1][-1] == {"whole": False}  # whose place is the page
    assert here.artifact(flow_run, "only-chart")
    here.until_logged(flow_run, "no page is written")


def test_a_missing_extra_is_named_with_its_remedy(here, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "teacher_cache.pipeline.report.collect", None)
    left, flow_run = only_a_report(tmp_path / "report.html")
    assert (left.collected, left.page) == (False, None)
    assert "[report]'" in here.until_logged(flow_run, "no report")


@flow(name="uses-a-gpu")
def uses_a_gpu(name, events):
    with device_slots("cuda"):
        events.append((name, "in"))
        time.sleep(1)
        events.append((name, "out"))


def test_two_flow_runs_take_turns_on_a_gpu(here, monkeypatch):
    """Two runs at once, as two workers start them, on a card that is none: the work sleeps."""
    monkeypatch.setattr("teacher_cache.flows.devices.gpu_limits", lambda device, devices: ["gpu:0@test", "gpu:1@test"])
    events, failed = [], []

    def call(name):
        try:
            uses_a_gpu(name, events)
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=contextvars.copy_context().run, args=(call, name)) for name in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert not failed
    assert [what for _, what in events] == ["in", "out", "in", "out"]
    assert {name for name, _ in events} == {"a", "b"}
    with get_client(sync_client=True) as client:
        for name in ("gpu:0@test", "gpu:1@test"):
            limit = client.read_global_concurrency_limit_by_name(name)
            assert (limit.limit, limit.active_slots) == (1, 0)


def test_each_flow_holds_its_gpu_while_it_works(here, monkeypatch, tmp_path):
    monkeypatch.setattr("teacher_cache.flows.devices.gpu_limits", lambda device, devices=1: ["gpu:7@test"])
    seen = []

    def slots():
        with get_client(sync_client=True) as client:
            return client.read_global_concurrency_limit_by_name("gpu:7@test").active_slots

    def look(*_, **__):
        seen.append(slots())
        raise UsageError("seen")

    for work in (
        "teacher_cache.pipeline.models.teacher.cached_teacher",
        "teacher_cache.pipeline.train.loop.train",
        "teacher_cache.pipeline.evaluate.retrieval.evaluate",
    ):
        monkeypatch.setattr(work, look)
    cache, run = str(tmp_path / "c.cache"), str(tmp_path / "run")
    for stage, parameters in (
        (precompute_teacher, {"dataset": "scenes:s", "teacher": "t", "cache": cache}),
        (train_student, {"cache": cache, "student": "s", "out": run}),
        (evaluate_student, {"run": run}),
    ):
        with pytest.raises(UsageError, match="seen"):
            stage(**parameters)
        assert slots() == 0
    assert seen == [1, 1, 1]


def test_a_limit_that_was_given_more_slots_keeps_them(here, monkeypatch):
    monkeypatch.setattr("teacher_cache.flows.devices.gpu_limits", lambda device, devices: ["gpu:5@test"])
    with get_client(sync_client=True) as client:
        client.upsert_global_concurrency_limit_by_name("gpu:5@test", 3)
        uses_a_gpu("a", [])
        assert client.read_global_concurrency_limit_by_name("gpu:5@test").limit == 3


def test_no_limit_is_made_for_a_cpu(served, trained):
    """The flows of these tests ran on a CPU; only what a test made is there."""
    limits = served.ask("v2/concurrency_limits/filter", {})
    hosts = {limit["name"].partition("@")[2] for limit in limits if limit["name"].startswith("gpu:")}
    assert hosts <= {"test"}, json.dumps(limits)
