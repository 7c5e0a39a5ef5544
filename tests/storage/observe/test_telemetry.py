"""Metrics over real HTTP while a real run works; nothing at all when nobody asked."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from teacher_cache.pipeline.data.datasets.samples import ImageSource
from teacher_cache.pipeline.models.teacher import LiveTeacher, load_teacher
from teacher_cache.pipeline.precompute.encode import encode_shared
from teacher_cache.pipeline.precompute.plan import plan_precompute
from teacher_cache.pipeline.precompute.run import precompute
from teacher_cache.pipeline.settings.precompute import PrecomputeConfig
from teacher_cache.pipeline.train.loop import StepProgress, train
from teacher_cache.storage.errors import UsageError
from teacher_cache.storage.format.commits import ChunkRef
from teacher_cache.storage.observe import logs
from teacher_cache.storage.observe.logs import RUN, event, events_are_counted, logger
from teacher_cache.storage.observe.telemetry import (
    METRICS_HOST,
    METRICS_PORT,
    Metrics,
    count_input,
    observed,
    require_metrics,
)
from teacher_cache.storage.write.writer import EmbeddingWriter
from tests.commands import run_command
from tests.pipeline.train.train_work import make_cache, make_student, train_config

PROJECT = Path(__file__).resolve().parents[3]
IMAGES, CHUNK, BAD = 20, 8, "0003.jpg"

Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]


def parsed(text: str) -> Samples:
    """Value by name and labels, as Prometheus reads it."""
    families = text_string_to_metric_families(text)
    return {(each.name, tuple(sorted(each.labels.items()))): each.value for part in families for each in part.samples}


def scrape(url: str) -> Samples:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(url, timeout=10) as answer:
        return parsed(answer.read().decode())


def value(found: Samples, name: str, **labels: str) -> float:
    return found[f"teacher_cache_{name}", tuple(sorted(labels.items()))]


def served_at(capsys: pytest.CaptureFixture[str]) -> str:
    """Where the run that has just begun says its metrics are."""
    found = re.search(r"^metrics: (http://127\.0\.0\.1:\d+/metrics)$", capsys.readouterr().err, re.MULTILINE)
    assert found is not None
    return found[1]


@pytest.fixture
def any_port(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(METRICS_PORT, "0")
    monkeypatch.delenv(METRICS_HOST, raising=False)


def settings(photos: Path, teacher: Path, cache: Path) -> dict[str, Any]:
    (photos / "images" / BAD).write_bytes(b"no image")
    return {
        "dataset": f"flickr:{photos}",
        "teacher": f"local-dir:{teacher}",
        "cache": str(cache),
        "chunk_rows": CHUNK,
        "device": "cpu",
    }


@pytest.mark.usefixtures("any_port")
def test_a_precompute_can_be_asked_while_it_works(
    make_photos: Callable[..., Path], tiny_teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Asked at each step of its progress: counters only rise, and end at what the cache says of itself."""
    seen: list[Samples] = []
    url = ""

    def ask(stage: str, done: int, total: int) -> None:
        nonlocal url
        url = url or served_at(capsys)
        seen.append(scrape(url))

    made = precompute(PrecomputeConfig(**settings(make_photos(IMAGES), tiny_teacher, tmp_path / "c")), ask)
    last = seen[-1]  # with the last batch; the last chunks may not be on the disk yet
    assert value(last, "rows_total", tower="image") == IMAGES
    assert value(last, "progress_rows", tower="image") == value(last, "wanted_rows", tower="image") == IMAGES
    assert value(last, "decode_seconds_count", tower="image") == IMAGES
    assert value(last, "decode_seconds_sum", tower="image") > 0
    assert 1 <= value(last, "write_seconds_count", tower="image") <= -(-IMAGES // CHUNK)
    assert value(last, "teacher_seconds_sum", tower="image") > 0
    assert value(last, "bad_samples_total", kind="undecodable-image") == made.quarantined == 1
    assert value(last, "queue_depth", queue="decode") == 0
    rows = [each.get(("teacher_cache_rows_total", (("tower", "image"),)), 0.0) for each in seen]
    assert rows == sorted(rows)
    assert len(set(rows)) > 2
    assert not events_are_counted()
    with pytest.raises(OSError, match="refused"):
        scrape(url)


@pytest.mark.usefixtures("any_port")
def test_training_counts_pairs_steps_and_waits(
    tiny_teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(METRICS_PORT, "")
    cache = make_cache(tmp_path, tiny_teacher)
    monkeypatch.setenv(METRICS_PORT, "0")
    seen: list[tuple[StepProgress, Samples]] = []
    url = ""

    def ask(at: StepProgress) -> None:
        nonlocal url
        url = url or served_at(capsys)
        seen.append((at, scrape(url)))

    record = train(train_config(cache, make_student(tmp_path / "s.json"), tmp_path / "run"), ask).record
    assert len(seen) == record.steps
    for at, found in seen:
        assert value(found, "train_samples_total") == 8 * at.step
        assert value(found, "train_step_seconds_count") == at.step
        assert value(found, "train_loss") == pytest.approx(at.loss)
    assert value(seen[-1][1], "train_data_wait_seconds_total") > 0
    assert value(seen[-1][1], "train_step_seconds_sum") < record.seconds


def two_ports_in_a_row() -> int:
    """The first of two free ports that the system gives nobody who asks for any port: those begin at 32768."""
    for port in range(20_000 + os.getpid() % 10_000, 32_766):
        with socket.socket() as first, socket.socket() as second, contextlib.suppress(OSError):
            first.bind(("127.0.0.1", port))
            second.bind(("127.0.0.1", port + 1))
            return port
    raise AssertionError("no two ports in a row are free")


def test_each_process_of_a_run_has_a_port_of_its_own(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.socket() as first:
        port = two_ports_in_a_row()
        first.bind(("127.0.0.1", port))
        first.listen()
        monkeypatch.setenv(METRICS_PORT, str(port))
        taken = rf"metrics cannot be served on 127.0.0.1:{port}: Address already in use"
        # every run of a machine may have the environment: none fails for it
        with observed(), observed():
            assert not events_are_counted()
        (warning,) = capsys.readouterr().err.splitlines()
        assert re.match(f"warning: {taken}", warning)
        monkeypatch.setenv("TEACHER_CACHE_METRICS_REQUIRED", "")  # so that it is put back
        require_metrics(port)
        with pytest.raises(UsageError, match=taken), observed():
            pass
        with observed(process=1):
            assert served_at(capsys).endswith(f":{port + 1}/metrics")
    monkeypatch.setenv(METRICS_PORT, "http")
    with pytest.raises(UsageError, match="METRICS_PORT is 'http': a port from 0"), observed():
        pass


@pytest.mark.parametrize("by_flag", [True, False])
def test_a_taken_port_ends_the_command_that_named_it(
    by_flag: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The flag does, the environment does not: that run comes to its own error, of a teacher that cannot be loaded."""
    (tmp_path / "open_clip_config.json").write_text("{}")
    (tmp_path / "pairs.csv").write_text("path,caption\na.jpg,a\n")
    where = ["--dataset", f"table:{tmp_path}/pairs.csv", "--cache", str(tmp_path / "c")]
    with socket.socket() as first:
        first.bind(("127.0.0.1", 0))
        first.listen()
        port = str(first.getsockname()[1])
        words = ["precompute", *where, "--teacher", f"local-dir:{tmp_path}"]
        words += ["--metrics-port", port] if by_flag else []
        done = run_command(*words, env={} if by_flag else {METRICS_PORT: port})
    assert done.returncode == 2
    first_line, *others = done.stderr.splitlines()
    assert f"metrics cannot be served on 127.0.0.1:{port}" in first_line
    assert first_line.startswith("error: " if by_flag else "warning: ")
    assert len(others) == (0 if by_flag else 1)


def test_what_nobody_asked_for_costs_nothing(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """A job is left as it is, no record is made of an event, and prometheus-client is not imported."""
    # as nobody left it: servers that other tests start in this process turn the root logger up
    caplog.set_level(logging.WARNING, logger="teacher_cache.precompute")
    monkeypatch.delenv(METRICS_PORT, raising=False)
    monkeypatch.setattr(logging.Logger, "makeRecord", fail)

    job: Future[None] = Future()
    monkeypatch.setattr(job, "add_done_callback", fail)
    with observed():
        count_input(job, "image", lambda result: [])
        event(logger("precompute"), logging.INFO, "chunk committed", chunk="image/v0/000000")
    code = "import sys, teacher_cache.pipeline.precompute.run, teacher_cache.pipeline.train.loop; sys.exit('prometheus_client' in sys.modules)"  # noqa: E501
    assert subprocess.run([sys.executable, "-c", code], cwd=PROJECT).returncode == 0


def counted(name: str, **labels: str) -> float | None:
    """What the run at hand has counted so far."""
    assert isinstance(logs._count, Metrics)
    return logs._count.registry.get_sample_value(f"teacher_cache_{name}", labels)


@pytest.mark.usefixtures("any_port")
def test_a_job_that_fails_or_is_cancelled_leaves_the_queue() -> None:
    go_on = threading.Event()

    def fails() -> None:
        go_on.wait()
        raise OSError("gone")

    with observed(), ThreadPoolExecutor(1) as pool:
        job, never = pool.submit(fails), pool.submit(fails)
        for future in (job, never):
            count_input(future, "image", lambda result: [])
        assert counted("queue_depth", queue="decode") == 2
        never.cancel()
        go_on.set()
        with pytest.raises(OSError, match="gone"):
            job.result()
        pool.shutdown()
        assert counted("queue_depth", queue="decode") == 0


def test_events_without_a_metric_or_with_more_fields_are_no_error() -> None:
    metrics = Metrics()
    metrics("checkpoint saved", {"step": 3})
    metrics("chunk committed", {"chunk": "text/000001", "write_seconds": 0.5, "rows": [0, 8]})
    metrics("row quarantined", {"chunk": "image/v0/000000", "row": 7, "reason": "undecodable-image"})
    metrics("problem in the dataset", {"kind": "missing-file", "where": "a", "detail": "b", "lost_image": True})
    value_of = metrics.registry.get_sample_value
    assert value_of("teacher_cache_write_seconds_sum", {"tower": "text"}) == 0.5
    for kind in ("undecodable-image", "missing-file"):
        assert value_of("teacher_cache_bad_samples_total", {"kind": kind}) == 1


@pytest.mark.parametrize("kind", ['a"} 9\n# HELP x\nx{y="', "a\\", "\r\u2028\u202e\x1b[2J"])
def test_no_label_is_more_than_a_label(kind: str) -> None:
    from prometheus_client import generate_latest

    metrics = Metrics()
    metrics("row quarantined", {"reason": kind})
    families = text_string_to_metric_families(generate_latest(metrics.registry).decode())
    samples = [sample for family in families for sample in family.samples if sample.name.endswith("bad_samples_total")]
    assert [(sample.labels, sample.value) for sample in samples] == [({"kind": kind}, 1)]


@pytest.mark.usefixtures("any_port")
def test_progress_is_of_the_run_not_of_each_call_and_a_call_tried_again_counts_once(
    make_photos: Callable[..., Path], tiny_teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Calls one after another; the last one fails at its end and is tried again."""
    config = PrecomputeConfig(**settings(make_photos(IMAGES), tiny_teacher, tmp_path / "c"))
    teacher = load_teacher(config.teacher, device="cpu")
    with observed():
        images = [ref for ref in plan_precompute(config, teacher) if ref.tower == "image"]
        assert (counted("progress_rows", tower="image"), counted("wanted_rows", tower="image")) == (0, IMAGES)
        for last in (1, 2):
            encode_shared(config, teacher, images[last - 1 : last])
            assert counted("progress_rows", tower="image") == CHUNK * last
            assert counted("wanted_rows", tower="image") == IMAGES
        with monkeypatch.context() as broken:
            broken.setattr(EmbeddingWriter, "write", fail)
            with pytest.raises(OSError, match="the disk is full"):
                encode_shared(config, teacher, images[2:])
        assert counted("progress_rows", tower="image") == 2 * CHUNK
        encode_shared(config, teacher, images[2:])
        assert counted("progress_rows", tower="image") == counted("wanted_rows", tower="image") == IMAGES
        plan_precompute(config, teacher)
        assert (counted("progress_rows", tower="image"), counted("wanted_rows", tower="image")) == (0, 0)


@pytest.mark.usefixtures("any_port")
def test_a_try_after_a_failure_counts_at_once_what_the_first_one_committed(
    make_photos: Callable[..., Path], tiny_teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One call encodes all chunks of a run, so that its progress must not begin at nothing again."""
    config = PrecomputeConfig(**settings(make_photos(IMAGES), tiny_teacher, tmp_path / "c"))
    teacher = load_teacher(config.teacher, device="cpu")
    write, told = EmbeddingWriter.write, list[tuple[str, int, int]]()

    def fail_at_the_third(self: EmbeddingWriter, ref: ChunkRef, *args: Any) -> None:
        if ref.chunk == 2:
            fail()
        write(self, ref, *args)

    with observed():
        images = [ref for ref in plan_precompute(config, teacher) if ref.tower == "image"]
        with monkeypatch.context() as broken:
            broken.setattr(EmbeddingWriter, "write", fail_at_the_third)
            with pytest.raises(OSError, match="the disk is full"):
                encode_shared(config, teacher, images)
        assert counted("progress_rows", tower="image") == 0
        assert encode_shared(config, teacher, images, lambda *call: told.append(call)) == len(images) - 2
        assert told[0] == ("images", 2 * CHUNK + 4, IMAGES)  # with the first batch, and never less
        assert told == sorted(told)
        assert told[-1] == ("images", IMAGES, IMAGES)
        assert counted("progress_rows", tower="image") == counted("wanted_rows", tower="image") == IMAGES


@pytest.mark.usefixtures("any_port")
def test_a_run_that_fails_leaves_no_queue(
    make_photos: Callable[..., Path], tiny_teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its other samples wait for the one thread when the first of them ends the run."""
    few = {"batch_size": 1, "decode_threads": 1}
    config = PrecomputeConfig(**settings(make_photos(IMAGES), tiny_teacher, tmp_path / "c"), **few)
    teacher = load_teacher(config.teacher, device="cpu")
    read = ImageSource.read
    waiting = None

    def slow(self: ImageSource, *where: Any) -> bytes:
        time.sleep(0.05)
        return read(self, *where)

    def overflow(*_: object) -> None:
        nonlocal waiting
        waiting = counted("queue_depth", queue="decode")
        event(logger("precompute"), logging.DEBUG, "chunks in flight", chunks=1)
        raise FloatingPointError("infinite")

    with observed():
        pending = plan_precompute(config, teacher)
        monkeypatch.setattr(ImageSource, "read", slow)
        monkeypatch.setattr(LiveTeacher, "encode_shown", overflow)
        with pytest.raises(FloatingPointError, match="infinite"):
            encode_shared(config, teacher, pending)
        assert waiting is not None
        assert waiting > 1
        assert counted("queue_depth", queue="decode") == counted("queue_depth", queue="write") == 0


@pytest.mark.usefixtures("any_port")
def test_copied_rows_are_none_of_the_teachers_seconds(
    make_photos: Callable[..., Path], tiny_teacher: Path, tmp_path: Path
) -> None:
    made = settings(make_photos(IMAGES), tiny_teacher, tmp_path / "c")
    precompute(PrecomputeConfig(**made))
    again = PrecomputeConfig(**{**made, "cache": str(tmp_path / "again"), "reuse": made["cache"]})
    with observed():
        assert precompute(again).rows_reused["image"] > 0
        assert counted("rows_total", tower="text") == 2 * IMAGES
        assert counted("teacher_seconds_count", tower="text") is None


def fail(*_: object) -> None:
    raise OSError("the disk is full")


def test_gpus_are_told_of_once_torch_has_started_them(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(index: int) -> int:
        if index:
            raise ModuleNotFoundError("pynvml")
        return 62

    cuda = SimpleNamespace(
        is_available=lambda: True,
        is_initialized=lambda: started,
        device_count=lambda: 2,
        memory_allocated=lambda index: 100 + index,
        memory_reserved=lambda index: 200 + index,
        get_device_properties=lambda index: SimpleNamespace(total_memory=1000),
        utilization=unknown,
    )
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=cuda))
    counting = Metrics()
    started = False
    memory = {"device": "1", "kind": "reserved"}
    assert counting.registry.get_sample_value("teacher_cache_gpu_memory_bytes", memory) is None
    started = True
    assert counting.registry.get_sample_value("teacher_cache_gpu_memory_bytes", memory) == 201
    assert counting.registry.get_sample_value("teacher_cache_gpu_utilization_ratio", {"device": "0"}) == 0.62
    assert counting.registry.get_sample_value("teacher_cache_gpu_utilization_ratio", {"device": "1"}) is None


@pytest.mark.gpu
def test_a_gpu_in_use_is_told_of() -> None:
    import torch

    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    kept = torch.zeros(1_000_000, device="cuda")
    found = Metrics().registry.get_sample_value("teacher_cache_gpu_memory_bytes", {"device": "0", "kind": "allocated"})
    assert found is not None
    assert found >= kept.nbytes


def test_the_commands_log_json_alone_with_run_chunk_and_row(
    make_photos: Callable[..., Path], tiny_teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``precompute`` and ``train`` as commands: each line of stderr parses, and bad rows are named."""
    monkeypatch.delenv(METRICS_PORT, raising=False)

    def run(*words: str) -> list[dict[str, Any]]:
        done = run_command(*words, "--device", "cpu", "--log-format", "json", env={RUN: "night-3"})
        assert done.returncode == 0, done.stderr
        return [json.loads(line) for line in done.stderr.splitlines()]

    cache = tmp_path / "c"
    chosen = settings(make_photos(IMAGES), tiny_teacher, cache)
    del chosen["device"], chosen["chunk_rows"]
    flags = [word for name, each in chosen.items() for word in (f"--{name.replace('_', '-')}", str(each))]
    said = run("precompute", *flags, "--set", f"chunk_rows={CHUNK}", "--metrics-port", "0")
    assert {line["run"] for line in said} == {"night-3"}
    committed = [line for line in said if line["message"] == "chunk committed"]
    assert Counter(line["chunk"].split("/")[0] for line in committed) == {"image": 3, "text": 5}
    images = [line["rows"] for line in committed if line["chunk"].startswith("image")]
    assert sorted(images) == [[0, 8], [8, 16], [16, 20]]
    (lost,) = [line for line in said if line["message"] == "row quarantined"]
    assert (lost["chunk"], lost["row"], lost["sample_id"]) == ("image/v0/000000", 3, BAD)
    assert (lost["level"], lost["cache"]) == ("warning", str(cache))
    (served,) = [line for line in said if line["message"] == "metrics are served"]
    assert served["url"].startswith("http://127.0.0.1:")

    student, out = str(make_student(tmp_path / "s.json")), str(tmp_path / "run")
    flags = ["--cache", str(cache), "--student", student, "--out", out, "--epochs", "1", "--batch-size", "5"]
    said = run("train", *flags)
    finished = [line for line in said if line["message"] == "epoch finished"]
    assert [(line["run"], line["step"], line["num_rows"]) for line in finished] == [(out, 3, 15)]
    assert [line["checkpoint"] for line in said if line["message"] == "checkpoint saved"] == ["checkpoints/epoch-0001"]
