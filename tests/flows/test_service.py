"""The flows as a user runs them: a real server, a real worker, the real ``prefect`` command."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from teacher_cache.flows import precompute_teacher as flow_module
from teacher_cache.flows.retries import RETRIES
from teacher_cache.storage.check.verify import verify_cache
from tests.flows.conftest import CAPTIONS, IMAGES, Serve, committed, precompute_settings, running
from tests.object_store import free_ports

pytestmark = pytest.mark.service


def test_a_deployment_run_makes_a_whole_cache_in_one_encode_call(served, precomputed):
    cache, flow_run = precomputed
    report = verify_cache(str(cache))
    assert report.ok, report.findings
    assert (report.images, report.captions, report.quarantined) == (IMAGES, CAPTIONS, 1)
    # 15 chunks of two towers, and one pass of the pipe
    assert served.task_names(flow_run) == ["plan", "encode", "seal", "report"]


def test_the_artifact_tells_what_the_cache_holds(served, precomputed):
    cache, flow_run = precomputed
    table = served.table("precompute-teacher")
    assert table["cache"] == str(cache)
    assert (table["images"], table["captions"], table["chunks"]) == (IMAGES, CAPTIONS, 15)
    assert table["chunks encoded by this run"] == 15
    assert (table["quarantined"], table["problem undecodable-image"]) == (1, 1)
    assert table["manifest digest"] == verify_cache(str(cache)).manifest_digest
    problem = "undecodable-image: train/cat/3.jpg: "
    assert f"- `{problem}" in served.artifact(flow_run, "precompute-teacher-report")["data"]
    wanted = {"flow_run_id": {"any_": [flow_run]}, "level": {"ge_": 30}}
    (warning,) = served.ask("logs/filter", {"logs": wanted})
    assert (warning["level"], warning["message"][: len(problem)]) == (30, problem)
    assert served.artifact(flow_run, "precompute-teacher-progress")["data"] == 100.0


def test_what_serve_says_to_type_is_right(served):
    export, run, *_ = served.command()
    assert export == f"export PREFECT_API_URL={served.api}"
    assert run.endswith("prefect deployment run precompute-teacher/default --watch")
    assert "prefect flow-run logs UUID" in served.worker_log()
    before, _, _ = served.worker_log().partition("ready:")
    assert "start a worker" not in before  # Prefect's advice for each deployment, although one is started
    deployment = served.ask("deployments/name/precompute-teacher/default")
    form = deployment["parameter_openapi_schema"]
    assert form["required"] == ["dataset", "teacher", "cache"]
    assert all(field["description"] for field in form["properties"].values())


def test_parameters_out_of_range_are_refused_before_a_run_is_made(served):
    code, output, flow_run = served.run("precompute-teacher/default", watch=False, advanced={"chunk_rows": 0})
    assert (code, flow_run) == (1, "")
    assert "Validation failed for field 'advanced.chunk_rows'. Failure reason: 0 is less than" in output
    # a setting for experts that is given as an everyday one
    code, output, flow_run = served.run("precompute-teacher/default", watch=False, chunk_rows=8)
    assert (code, flow_run) == (1, "")
    assert "not found on the deployment: 'chunk_rows'" in output
    assert "'device', 'report', 'advanced'" in output


def test_a_wrong_parameter_fails_the_run_with_the_reason_and_no_retry(served, tiny_teacher):
    cache = served.folder / "never.cache"
    parameters = precompute_settings("/nowhere", tiny_teacher, cache) | {"dataset": "flicker:/data"}
    code, output, flow_run = served.run("precompute-teacher/default", **parameters)
    assert code == 1, output
    made = served.ask(f"flow_runs/{flow_run}")
    assert made["name"] == f"data x {tiny_teacher.name} -> never.cache"
    assert made["state"]["type"] == "FAILED"
    reason = "UsageError: dataset kind 'flicker' is not known. Did you mean flickr?"
    assert made["state"]["message"].startswith(f"Flow run encountered an exception: {reason}")
    # --watch shows the reason, and neither it nor the run's log a traceback
    assert reason in " ".join(output.split())
    logged = served.until_logged(flow_run, f'Failed("Flow run encountered an exception: {reason}')
    assert "Traceback" not in output + logged
    (task,) = served.ask("task_runs/filter", {"flow_runs": {"id": {"any_": [flow_run]}}})
    assert (task["name"], task["run_count"]) == ("plan", 1)
    progress = served.artifact(flow_run, "precompute-teacher-progress")
    assert progress["data"] == 0
    assert f"`: failed, {reason}" in progress["description"]
    assert not cache.exists()


def test_a_value_that_only_the_flow_can_check_fails_a_named_run_with_one_sentence(served):
    code, output, flow_run = served.run("precompute-teacher/default", device="gpu")
    assert code == 1, output
    made = served.ask(f"flow_runs/{flow_run}")
    assert made["name"] == "scenes x scenes -> scenes.cache"
    reason = "UsageError: precompute-teacher: device: device 'gpu' is not known; use auto, cpu, cuda or cuda:N"
    assert made["state"]["message"] == f"Flow run encountered an exception: {reason}"
    assert reason in " ".join(output.split())
    logged = served.until_logged(flow_run, f'Failed("Flow run encountered an exception: {reason}')
    assert "Traceback" not in output + logged


def test_a_student_is_trained_and_measured(served, trained):
    out, flow_run = trained
    name = f"tiny from pictures.cache -> {served.folder.name}/run"
    assert served.ask(f"flow_runs/{flow_run}")["name"] == name
    assert served.task_names(flow_run) == ["train", "evaluate", "report"]
    table = served.table("train-student")
    assert table["train images"] == 19  # 20, one of them not an image
    assert table["steps"] == 4
    assert {"loss of epoch 1", "loss of epoch 2", "student i2t R@1 %", "mean retention %"} <= set(table)
    assert (out / "checkpoints" / "epoch-0002").is_dir()
    assert table["checkpoint"] == str(out / "checkpoints" / "epoch-0002")
    assert table["measured checkpoint"].startswith("checkpoints/best-epoch-")


def test_a_lost_connection_is_retried_and_a_damaged_cache_is_not(here, pictures, tiny_teacher, tmp_path, monkeypatch):
    """In this process, against the real server, with an encoder that fails again and again, each time one chunk on."""
    import teacher_cache.pipeline.precompute.encode
    from teacher_cache.storage.errors import CacheCorruptError

    real, failures, tried = teacher_cache.pipeline.precompute.encode.encode_shared, [], []

    def encode(config, teacher, refs, progress, writer):
        tried.append(len(refs))
        if not failures:
            return real(config, teacher, refs, progress, writer=writer)
        left = [ref for ref in refs if ref not in writer.written]
        real(config, teacher, left[:1], progress, writer=writer)
        raise failures.pop(0)

    monkeypatch.setattr(teacher_cache.pipeline.precompute.encode, "encode_shared", encode)
    monkeypatch.setattr("teacher_cache.flows.retries.RETRY_DELAYS", [0.0] * RETRIES)
    parameters = precompute_settings(pictures, tiny_teacher, tmp_path / "c.cache", report=False, chunk_rows=8)
    failures[:] = [CacheCorruptError("a bad chunk")]
    with pytest.raises(CacheCorruptError, match="a bad chunk"):
        flow_module.precompute_teacher(**parameters)
    assert tried == [15]
    failures[:] = [ConnectionResetError("the share is away")] * (2 * RETRIES)
    # one call for all that is pending, more failures than a task has retries, and every chunk of this run is counted
    assert flow_module.precompute_teacher(**parameters)["chunks_encoded"] == 14
    assert tried == [15] + [14] * (2 * RETRIES + 1)


def test_a_port_that_is_taken_is_named(tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        environment = {**os.environ, "PREFECT_HOME": str(tmp_path), "PREFECT_SERVER_API_PORT": str(port)}
        done = subprocess.run(
            [sys.executable, "-m", "teacher_cache.flows.serve"], env=environment, capture_output=True, text=True
        )
    assert done.returncode == 1
    assert f"Port {port} is already in use" in done.stdout + done.stderr
    assert "error: the server stopped by itself with code 1" in done.stdout


def test_a_second_serve_of_one_home_is_refused_and_the_first_goes_on(served):
    (port,) = free_ports(1)
    done = subprocess.run(
        [sys.executable, "-m", "teacher_cache.flows.serve", "--port", str(port)],
        env=served.environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert re.search(r"home is in use by another serve, .*\(server \d+, worker \d+\)", done.stdout), done.stdout
    assert served.ask("health") is True


def test_stopped_in_the_middle_it_goes_on_where_it_was(tmp_path, half_served, tiny_teacher):
    """Ctrl-C in a run leaves no process, and no slot that the next run waits for. Then the worker dies."""
    serve = Serve(tmp_path)
    cache, (dataset, gate) = tmp_path / "slow.cache", half_served
    parameters = precompute_settings("", tiny_teacher, cache, report=False, chunk_rows=1) | {"dataset": dataset}
    try:
        with socket.socket() as taken:  # as by another process that runs tests: then it starts on another port
            taken.bind(("127.0.0.1", serve.port))
            taken.listen()
            serve.start()
            assert serve.port != taken.getsockname()[1]
        code, output, first = serve.run("precompute-teacher/default", watch=False, **parameters)
        assert code == 0, output
        serve.until_committed(cache)
        assert serve.stop(signal.SIGINT) == 0
        done = committed(cache)
        assert 3 <= done <= 8

        gate.set()
        serve.start()
        assert serve.ask(f"flow_runs/{first}")["state"]["type"] == "CRASHED"
        code, output, _ = serve.run("precompute-teacher/default", **parameters)
        assert code == 0, output
        assert serve.table("precompute-teacher")["chunks encoded by this run"] == 2 * IMAGES - done
        assert verify_cache(str(cache)).ok

        worker = next(pid for pid in serve.descendants() if b"worker" in Path(f"/proc/{pid}/cmdline").read_bytes())
        others = serve.descendants()
        os.kill(worker, signal.SIGKILL)
        assert serve.process.wait(60) == 1
        assert "error: the worker stopped by itself with code -9" in serve.log.read_text()
        assert not [pid for pid in others if running(pid)]
    finally:
        if serve.process is not None:
            serve.stop()


def test_cancelling_ends_the_process_and_leaves_a_cache_that_another_run_finishes(served, half_served, tiny_teacher):
    cache, (dataset, gate) = served.folder / "cancelled.cache", half_served
    parameters = precompute_settings("", tiny_teacher, cache, report=False, chunk_rows=1) | {"dataset": dataset}
    before = served.descendants()
    code, output, flow_run = served.run("precompute-teacher/default", watch=False, **parameters)
    assert code == 0, output
    served.until_committed(cache)
    started = served.descendants() - before
    assert any(b"prefect" in Path(f"/proc/{pid}/cmdline").read_bytes() for pid in started)
    # as `prefect flow-run cancel` and the UI do it
    served.ask(f"flow_runs/{flow_run}/set_state", {"state": {"type": "CANCELLING", "name": "Cancelling"}})
    until = time.monotonic() + 60
    while any(running(pid) for pid in started):
        assert time.monotonic() < until, served.worker_log()
        time.sleep(0.1)
    while (state := served.ask(f"flow_runs/{flow_run}")["state"]["type"]) != "CANCELLED":
        assert time.monotonic() < until, f"{state}\n{served.worker_log()}"
        time.sleep(0.1)

    done = committed(cache)
    assert 3 <= done <= 8
    progress = served.artifact(flow_run, "precompute-teacher-progress")
    assert 0 < progress["data"] < 100
    assert re.fullmatch(r"`.*cancelled\.cache`: images: [1-8] of 28", progress["description"])
    report = verify_cache(str(cache))
    assert report.chunks_sound == done
    assert {finding.kind for finding in report.findings} == {"incomplete"}

    gate.set()
    code, output, _ = served.run("precompute-teacher/default", **parameters)
    assert code == 0, output + served.worker_log()
    assert served.table("precompute-teacher")["chunks encoded by this run"] == 2 * IMAGES - done
    assert verify_cache(str(cache)).ok
