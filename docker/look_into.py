"""Say what is wrong with the container that this runs in, and exit with 1: ``docker/try.sh`` pipes it into ours."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Iterator
from importlib.metadata import Distribution, distributions
from pathlib import Path

SBOM = Path("/usr/share/sbom/teacher-cache.cdx.json")


def _name(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def rights() -> Iterator[str]:
    """Yield what this process may do and should not: it has user 1000, no rights, and only volumes to write to."""
    status = dict(line.split(":\t", 1) for line in Path("/proc/self/status").read_text().splitlines())
    if os.getuid() != 1000:
        yield f"user {os.getuid()} in place of 1000"
    if int(status["CapEff"], 16) or int(status["CapBnd"], 16):
        yield f"capabilities {status['CapEff']}, bounded by {status['CapBnd']}"
    if status["NoNewPrivs"] != "1":
        yield "new privileges can be had"
    for folder in ("/", "/etc", "/work", "/home/teacher", sys.prefix):
        if os.access(folder, os.W_OK):
            yield f"{folder} can be written to"


def packages() -> Iterator[str]:
    """Yield packages that the image's list lacks or has in excess, and those whose licence it leaves out."""
    listed = {_name(part["name"]): part for part in json.loads(SBOM.read_text())["components"]}
    installed = {_name(package.metadata["Name"]): package for package in distributions()}
    del installed["teacher-cache"]  # what the list is of
    yield from (f"{name} is in one of the image and its list" for name in sorted(set(installed) ^ set(listed)))
    for name in sorted(set(installed) & set(listed)):
        if _tells_its_licence(installed[name]) and not listed[name].get("licenses"):
            yield f"{name} is listed without its licence"
    for name in re.findall(r"^Package: (.*)$", Path("/var/lib/dpkg/status").read_text(), re.MULTILINE):
        if not Path("/usr/share/doc", name, "copyright").exists():
            yield f"Debian's {name} is without its licence"


def _tells_its_licence(package: Distribution) -> bool:
    told = package.metadata
    classified = [line for line in told.get_all("Classifier") or () if line.startswith("License ::")]
    return bool(classified or told.get("License") or told.get("License-Expression"))


wrong = [*rights(), *packages()]
sys.exit("\n".join(wrong) or None)
