"""Print what an image installs, one requirement a line: ``requirements.py light|cpu|gpu|inventory``.

From pyproject.toml without the project's sources, so that the layer of dependencies (gigabytes, with torch) is built
again only when they change.
"""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path

EXTRAS = {
    "light": ["flows", "s3"],
    "cpu": ["train", "flows", "s3", "deploy", "report", "fastjpeg"],
    "gpu": ["gpu", "flows", "s3", "deploy", "report", "fastjpeg"],
}
# lists an image's packages while it is built; goes into no image
INVENTORY = "cyclonedx-bom"


def requirements(image: str, pyproject: Path) -> list[str]:
    """Return the requirements of an image, or of the inventory, in the order of pyproject.toml.

    Raises:
        KeyError: there is no such image.
    """
    project = tomllib.loads(pyproject.read_text())["project"]
    extras: dict[str, list[str]] = project["optional-dependencies"]
    if image == "inventory":
        return [line for line in extras["dev"] if line.startswith(INVENTORY)]
    return list(dict.fromkeys([*project["dependencies"], *_of_extras(EXTRAS[image], extras)]))


def _of_extras(names: list[str], extras: dict[str, list[str]]) -> list[str]:
    """Return the requirements of extras; an extra that names others of ours brings theirs."""
    lines: list[str] = []
    for line in (line for name in names for line in extras[name]):
        own = re.fullmatch(r"teacher-cache\[(.+)\]", line)
        lines += _of_extras(own[1].split(","), extras) if own else [line]
    return lines


if __name__ == "__main__":
    sys.stdout.write("\n".join(requirements(sys.argv[1], Path("pyproject.toml"))) + "\n")
