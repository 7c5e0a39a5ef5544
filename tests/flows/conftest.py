"""A server and a worker as a user gets them: ``python -m teacher_cache.flows.serve`` and the ``prefect`` command."""

from __future__ import annotations

import atexit
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from tests.conftest import TINY_MODEL
from tests.object_store import ServerEndedError, free_ports, started
from tests.pipeline.data.dataset_files import served as served_by

# importing prefect makes its home folder; not in that of whoever runs the tests
if "PREFECT_HOME" not in os.environ:
    os.environ["PREFECT_HOME"] = tempfile.mkdtemp(prefix="prefect-home-")
    atexit.register(shutil.rmtree, os.environ["PREFECT_HOME"], ignore_errors=True)

PROJECT = Path(__file__).resolve().parents[2]
UUID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
IMAGES, CAPTIONS = 28, 84  # of ``pictures``
QUIET = {
    "DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "PREFECT_CLI_COLORS": "false",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "COLUMNS": "200",
}


class Serve:
    """One ``python -m teacher_cache.flows.serve`` below a folder, from start to stop."""

    def __init__(self, folder: Path) -> None:
        self._take_another_port()
        self.folder = folder
        self.log = folder / "serve.log"
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
        self.environment = {**inherited, **QUIET, "PREFECT_HOME": str(folder / "home")}
        self.process: subprocess.Popen[bytes] | None = None
        self._started: set[int] = set()

    @property
    def api(self) -> str:
        return f"http://127.0.0.1:{self.port}/api"

    def start(self) -> None:
        started(self._start, self._take_another_port)

    def _take_another_port(self) -> None:
        (self.port,) = free_ports(1)

    def _start(self) -> None:
        with self.log.open("wb") as file:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "teacher_cache.flows.serve", "--port", str(self.port)],
                cwd=PROJECT,
                env=self.environment,
                stdout=file,
                stderr=subprocess.STDOUT,
            )
        until = time.monotonic() + 240
        while "ready:" not in self.log.read_text():
            if self.process.poll() is not None:
                raise ServerEndedError(self.log.read_text())
            assert time.monotonic() < until, self.log.read_text()
            time.sleep(0.2)

    def command(self) -> list[str]:
        """What ``teacher_cache.flows.serve`` says to type, first the setting, then the commands."""
        hint = self.log.read_text().partition("In another terminal:")[2]
        return [line.strip() for line in hint.splitlines() if line.startswith("  ")]

    def prefect(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        environment = {**self.environment, "PREFECT_HOME": str(self.folder / "client"), "PREFECT_API_URL": self.api}
        program = Path(sys.executable).with_name("prefect")
        return subprocess.run(
            [program, *arguments], cwd=self.folder, env=environment, capture_output=True, text=True, timeout=600
        )

    def run(self, deployment: str, watch: bool = True, **parameters: Any) -> tuple[int, str, str]:
        """``prefect deployment run``: exit code, output, id of the flow run (empty when it was refused)."""
        pairs = [f"{name}={json.dumps(value)}" for name, value in parameters.items()]
        flags = [flag for pair in pairs for flag in ("-p", pair)]
        done = self.prefect("deployment", "run", deployment, *flags, *(["--watch"] if watch else []))
        output = done.stdout + done.stderr
        found = re.search(f"UUID: ({UUID.pattern})", output)
        return done.returncode, output, found[1] if found else ""

    def ask(self, path: str, body: dict[str, Any] | None = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"{self.api}/{path}", data, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=30) as answer:
            return json.load(answer)

    def task_names(self, flow_run: str) -> list[str]:
        runs = self.ask(
            "task_runs/filter", {"flow_runs": {"id": {"any_": [flow_run]}}, "sort": "EXPECTED_START_TIME_ASC"}
        )
        return [run["name"] for run in sorted(runs, key=lambda run: run["start_time"] or "")]

    def table(self, key: str) -> dict[str, Any]:
        """The newest table artifact of this key."""
        newest = self.ask(f"artifacts/{key}/latest")
        assert newest["type"] == "table"
        return {row["what"]: row["value"] for row in json.loads(newest["data"])}

    def artifact(self, flow_run: str, key: str) -> dict[str, Any]:
        """The artifact of this key that a flow run left, with its type, data and description."""
        wanted = {"flow_runs": {"id": {"any_": [flow_run]}}, "artifacts": {"key": {"any_": [key]}}}
        (found,) = self.ask("artifacts/filter", wanted)
        return dict(found)

    def logs(self, flow_run: str) -> str:
        """What a flow run and its task runs have logged. Prefect sends lines in batches: see ``until_logged``."""
        wanted = {"logs": {"flow_run_id": {"any_": [flow_run]}}, "sort": "TIMESTAMP_ASC"}
        return "\n".join(line["message"] for line in self.ask("logs/filter", wanted))

    def until_logged(self, flow_run: str, text: str) -> str:
        """All that was logged, once a text is in it."""
        until = time.monotonic() + 30
        while text not in (logs := self.logs(flow_run)):
            assert time.monotonic() < until, logs
            time.sleep(0.2)
        return logs

    def until_committed(self, cache: Path) -> None:
        """Return when three chunks of a cache are committed."""
        until = time.monotonic() + 120
        while committed(cache) < 3:
            assert time.monotonic() < until, self.worker_log()
            time.sleep(0.05)

    def worker_log(self) -> str:
        return self.log.read_text()

    def descendants(self) -> set[int]:
        """Every process that this serve started, directly or not, and that still runs."""
        assert self.process is not None
        found: set[int] = set()
        ahead = [self.process.pid]
        while ahead:
            pid = ahead.pop()
            for file in Path(f"/proc/{pid}/task").glob("*/children"):
                children = {int(child) for child in file.read_text().split()} - found
                found |= children
                ahead += children
        return found

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Stop it as a user does; every process that it started must be gone. Returns its exit code."""
        assert self.process is not None
        mine = self.descendants()
        if self.process.poll() is None:
            self.process.send_signal(number)
        code = self.process.wait(90)
        alive = [pid for pid in mine if running(pid)]
        for pid in alive:
            os.kill(pid, signal.SIGKILL)
        assert not alive, f"left running: {alive}\n{self.log.read_text()}"
        return code


def committed(cache: Path) -> int:
    return len(list((cache / "commits").rglob("*.json")))


def running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.fixture(scope="session")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serve]:
    serve = Serve(tmp_path_factory.mktemp("served"))
    try:
        serve.start()
        yield serve
    finally:
        if serve.process is not None:
            code = serve.stop()
    assert code == 0
    said = [line for line in serve.log.read_text().splitlines() if line.startswith("stop")]
    assert said == ["stopping the worker", "stopping the server", "stopped"]


@pytest.fixture
def here(served: Serve, tmp_path: Path) -> Iterator[Serve]:
    """Flows called in this process report to the server."""
    from prefect.settings import PREFECT_API_URL, PREFECT_HOME, temporary_settings

    with temporary_settings({PREFECT_API_URL: served.api, PREFECT_HOME: tmp_path / "home"}):
        yield served


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """28 JPEGs in two splits and two classes; one of them is not an image."""
    from PIL import Image

    root = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for split, count in (("train", 10), ("test", 4)):
        for name in ("cat", "sea_lion"):
            folder = root / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                pixels = rng.integers(0, 256, (40, 48, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{number}.jpg")
    (root / "train" / "cat" / "3.jpg").write_bytes(b"not an image")
    return root


class HalfServed(BaseHTTPRequestHandler):
    """Pictures by HTTP. Each is given once; while the gate is shut, only the first eight are given again.

    A cache of them is planned, and stops in the middle of its images.
    """

    folder: Path
    given: set[str]
    gate: threading.Event

    def do_GET(self) -> None:
        if self.path in self.given and int(Path(self.path).stem) >= 8 and not self.gate.wait(1.0):
            self.send_error(503)
            return
        self.given.add(self.path)
        data = (self.folder / self.path[1:]).read_bytes()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        """Say nothing."""


@pytest.fixture
def half_served(tmp_path: Path) -> Iterator[tuple[str, threading.Event]]:
    """A dataset of 28 pictures by HTTP, each with a caption, and the gate that opens its second half."""
    from PIL import Image

    rng = np.random.default_rng(0)
    for number in range(IMAGES):
        Image.fromarray(rng.integers(0, 256, (40, 48, 3), dtype=np.uint8)).save(tmp_path / f"{number}.png")
    gate = threading.Event()
    with served_by(type("Handler", (HalfServed,), {"folder": tmp_path, "given": set(), "gate": gate})) as address:
        lines = [f"{address}/{number}.png,number {number}" for number in range(IMAGES)]
        (tmp_path / "pictures.csv").write_text("\n".join(["filepath,title", *lines]) + "\n")
        yield f"table:{tmp_path}/pictures.csv", gate


def precompute_settings(
    pictures: Path, teacher: Path, cache: Path, report: bool = True, **advanced: Any
) -> dict[str, Any]:
    return {
        "dataset": f"imagefolder:{pictures}",
        "teacher": f"local-dir:{teacher}",
        "cache": str(cache),
        "device": "cpu",
        "report": report,
        "advanced": advanced,
    }


class FlowRun(NamedTuple):
    """What a flow run made, and its id."""

    path: Path
    id: str


@pytest.fixture(scope="session")
def precomputed(served: Serve, pictures: Path, tiny_teacher: Path) -> FlowRun:
    """A cache made by a run of precompute-teacher."""
    cache = served.folder / "pictures.cache"
    parameters = precompute_settings(pictures, tiny_teacher, cache, chunk_rows=8)
    code, output, flow_run = served.run("precompute-teacher/default", **parameters)
    assert code == 0, output + served.worker_log()
    return FlowRun(cache, flow_run)


@pytest.fixture(scope="session")
def trained(served: Serve, precomputed: FlowRun) -> FlowRun:
    """A student trained and measured by a run of train-student, with a decoding process."""
    student = served.folder / "tiny.json"
    student.write_text(json.dumps(TINY_MODEL))
    out = served.folder / "run"
    code, output, flow_run = served.run(
        "train-student/default",
        cache=str(precomputed.path),
        student=str(student),
        out=str(out),
        epochs=2,
        batch_size=8,
        device="cpu",
        select_split="test",
        evaluate_split="test",
        advanced={"workers": 1, "evaluate_checkpoint": "best"},
    )
    assert code == 0, output + served.worker_log()
    return FlowRun(out, flow_run)
