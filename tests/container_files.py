"""The files of ``docker/`` as tests read them, and the services of compose.yaml run outside of containers.

What a container would run is taken from the files: command, environment, health check. Only what a container's own
network and folders give is put in by this machine: names of services become 127.0.0.1, ports become free ones.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

__all__ = [
    "DOCKER",
    "PROJECT",
    "Place",
    "Started",
    "compose",
    "image_environment",
    "job_of_the_pool",
    "kubernetes_objects",
]

PROJECT = Path(__file__).resolve().parents[1]
DOCKER = PROJECT / "docker"

# bounds for a machine under load, not expectations
_READY_SECONDS = 180
_STOP_SECONDS = 60

_VARIABLE = re.compile(r"\$(?:\$|\{(\w+)(?::([-?])([^}]*))?\})")


def compose(name: str, values: Mapping[str, str]) -> dict[str, Any]:
    """A compose file with ``${NAME}``, ``${NAME:-default}``, ``${NAME:?reason}`` and ``$$`` filled in.

    Raises ValueError with the reason for a name that must be set and is not.
    """

    def fill(found: re.Match[str]) -> str:
        variable, sign, rest = found.groups()
        if variable is None:
            return "$"
        if values.get(variable):
            return values[variable]
        if sign == "-":
            return str(rest)
        raise ValueError(f"{variable}: {rest or 'is not set and has no default'}")

    def walk(node: Any) -> Any:
        if isinstance(node, dict):
            return {key: walk(value) for key, value in node.items()}
        if isinstance(node, list):
            return [walk(value) for value in node]
        return _VARIABLE.sub(fill, node) if isinstance(node, str) else node

    return walk(yaml.safe_load((DOCKER / name).read_text()))


def image_environment() -> dict[str, str]:
    """What ENV of the Dockerfile's first stage sets for every image, but for PATH."""
    stage = (DOCKER / "Dockerfile").read_text().split("\nFROM ")[1].replace("\\\n", " ")
    lines = re.findall(r"^ENV (.*)$", stage, re.MULTILINE)
    return {name: value for line in lines for name, value in re.findall(r"(\w+)=(\S+)", line) if name != "PATH"}


def kubernetes_objects(name: str) -> list[dict[str, Any]]:
    """The objects of a manifest below ``docker/kubernetes``."""
    return list(yaml.safe_load_all((DOCKER / "kubernetes" / name).read_text()))


def job_of_the_pool(**variables: Any) -> dict[str, Any]:
    """The job that the kubernetes pool makes for a flow run, its template filled in as a worker does."""
    from prefect.utilities.templating import apply_values

    template = json.loads((DOCKER / "pools" / "kubernetes.json").read_text())
    defaults = {k: v["default"] for k, v in template["variables"]["properties"].items() if "default" in v}
    values = {**defaults, "command": ["prefect", "flow-run", "execute"], "name": "run", **variables}
    job: dict[str, Any] = apply_values(template["job_configuration"], values)["job_manifest"]
    return job


@dataclass
class Place:
    """Where services run instead of in containers: a folder for ``/work``, and what stands for names and ports."""

    work: Path
    programs: Path
    substitutes: list[tuple[str, str]]
    environment: dict[str, str] = field(default_factory=dict)

    def here(self, text: str) -> str:
        """A word of a command, or a value of an environment, as it is on this machine."""
        for pattern, replacement in self.substitutes:
            text = re.sub(pattern, replacement, text)
        return text

    def environment_of(self, service: Mapping[str, Any]) -> dict[str, str]:
        """What a container of a service would find in its environment, and nothing of ours but PATH and the like."""
        ours = {name: os.environ[name] for name in ("LANG", "SSL_CERT_FILE") if name in os.environ}
        path = os.pathsep.join([str(self.programs), str(Path(sys.executable).parent), "/usr/bin", "/bin"])
        given = {name: self.here(str(value)) for name, value in service.get("environment", {}).items()}
        return {**ours, **image_environment(), **self.environment, **given, "PATH": path}

    def run(self, service: Mapping[str, Any], command: list[str]) -> subprocess.CompletedProcess[str]:
        """Run a command to its end in what stands for a container of a service."""
        return subprocess.run(
            [self.here(word) for word in command],
            cwd=self.work,
            env=self.environment_of(service),
            capture_output=True,
            text=True,
            timeout=400,
        )


@dataclass
class Started:
    """A service that runs: its process and its log."""

    name: str
    process: subprocess.Popen[bytes]
    log: Path
    watch: subprocess.Popen[bytes]

    @classmethod
    def start(cls, name: str, command: list[str], log: Path, **options: Any) -> Started:
        """Start it in a session of its own: a Ctrl-C is for the tests, which stop it in order."""
        with log.open("wb") as file:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                **options,
            )
        # a session that is killed runs no `finally`: then the pipe ends, and the service is asked to stop
        watch = subprocess.Popen(
            ["sh", "-c", 'read _; kill "$1"', "sh", str(process.pid)], stdin=subprocess.PIPE, start_new_session=True
        )
        return cls(name, process, log, watch)

    def wait_until(self, ready: Callable[[], bool]) -> None:
        """Return once it is ready. AssertionError with its log: it ended, or took too long."""
        until = time.monotonic() + _READY_SECONDS
        while not ready():
            assert self.process.poll() is None, f"{self.name} ended: {self.log.read_text()[-3000:]}"
            assert time.monotonic() < until, f"{self.name} is not ready: {self.log.read_text()[-3000:]}"
            time.sleep(0.3)

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Ask it to stop; kill it if it does not. Returns its exit code, also the second time."""
        if self.watch.stdin is not None and not self.watch.stdin.closed:
            self.watch.kill()
            self.watch.wait()
            self.watch.stdin.close()
        if self.process.poll() is None:
            self.process.send_signal(number)
            try:
                self.process.wait(_STOP_SECONDS)
            except subprocess.TimeoutExpired:
                self.process.kill()
        return self.process.wait()
