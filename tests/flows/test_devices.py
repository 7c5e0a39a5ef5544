"""The slot of a device while Prefect's server dies and comes back; a real server, and a flow run in its own process."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from teacher_cache.flows import serve
from tests.flows.conftest import PROJECT, QUIET
from tests.object_store import Started, free_ports

pytestmark = pytest.mark.service

LEASE_SECONDS = 60  # the shortest that the server takes
HOLDER = """
import sys
from prefect import flow
from teacher_cache.flows import devices
devices.gpu_limits = lambda device, devices: ["gpu:0@test"]
devices._LEASE_SECONDS, devices._RENEW_SECONDS = 60.0, 1.0
@flow
def hold():
    with devices.device_slots("cuda"):
        print("in", flush=True)
        sys.stdin.read()
hold()
"""


class Server:
    """``prefect server start``, as ``make serve`` starts it."""

    def __init__(self, folder: Path) -> None:
        self.folder, (self.port,) = folder, free_ports(1)
        self.home, self.api = folder / "home", f"http://127.0.0.1:{self.port}/api"
        self.environment = {**serve._environment(self.home, self.api, self.port), **QUIET}

    def start(self) -> Started:
        command = [sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(self.port)]
        server = Started.start("server", command, self.folder / "server.log", cwd=PROJECT, env=self.environment)
        server.wait_until(lambda: self.ask("health") is True)
        return server

    def ask(self, path: str) -> Any:
        with contextlib.suppress(OSError), urllib.request.urlopen(f"{self.api}/{path}", timeout=10) as answer:
            return json.load(answer)

    def slots(self) -> int:
        return int(self.ask("v2/concurrency_limits/gpu:0@test")["active_slots"])

    def leases(self) -> set[str]:
        return set(json.loads((self.home / "concurrency_leases" / "expirations.json").read_text()))

    def end(self, lease: str) -> None:
        """End a lease, as the server does by itself when nobody has renewed it in time."""
        url, body = f"{self.api}/v2/concurrency_limits/decrement-with-lease", json.dumps({"lease_id": lease}).encode()
        urllib.request.urlopen(urllib.request.Request(url, body, {"Content-Type": "application/json"})).close()


def until(condition: Callable[[], bool], seconds: float) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.3)


def test_a_lease_that_ended_is_taken_again_and_a_killed_server_frees_that_of_a_dead_run(tmp_path: Path) -> None:
    server = Server(tmp_path)
    running, holder = server.start(), None
    try:
        holder = subprocess.Popen(
            [sys.executable, "-c", HOLDER],
            env={**server.environment, "PYTHONPATH": os.pathsep.join(sys.path)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"in\n"
        (lease,) = server.leases()
        server.end(lease)
        until(lambda: server.slots() == 1 and len(server.leases() - {lease}) == 1, 30)

        running.process.kill()
        holder.kill()
        running.stop()
        running = server.start()
        assert server.slots() == 1
        until(lambda: server.slots() == 0, 2 * LEASE_SECONDS)
    finally:
        if holder is not None:
            holder.kill()
            holder.communicate()
        running.stop()
