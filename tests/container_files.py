"""The files of ``docker/`` as tests read them, and the services of compose.yaml run outside of containers.

What a container would run is taken from the files: command, environment, health check. Only what a container's own
network and folders give is put in by this machine: names of services become 127.0.0.1, ports become free ones.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import yaml

PROJECT = Path(__file__).resolve().parents[1]
DOCKER = PROJECT / "docker"
# with characters that a URL would have to escape
SECRETS = {"POSTGRES_PASSWORD": "p@ss/w:rd", "AWS_ACCESS_KEY_ID": "a-key", "AWS_SECRET_ACCESS_KEY": "a-secret"}

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


def services() -> dict[str, dict[str, Any]]:
    """The services of compose.yaml by name."""
    found: dict[str, dict[str, Any]] = compose("compose.yaml", SECRETS)["services"]
    return found


def script(path: Path) -> ModuleType:
    """A script that is in no package, as a module."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


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
