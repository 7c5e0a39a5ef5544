"""Print what an image installs, one requirement a line: ``requirements.py light|cpu|gpu|inventory``.

From pyproject.toml without the sources of the project, so that the layer of dependencies (gigabytes, with torch)
is built again only when they change, and not with each line of code.
"""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path

EXTRAS = {
    "light": ["s3"],
    "cpu": ["cpu", "s3", "deploy", "report", "zeroshot", "fastjpeg"],
    "gpu": ["gpu", "s3", "deploy", "report", "zeroshot", "fastjpeg"],
}
# goes into no image: lists what is in them while they are built
INVENTORY = "cyclonedx-bom"
# what pipeline needs beyond storage; the light image serves, deploys and inspects, and encodes nothing
PIPELINE = {"torch", "torchvision", "open_clip_torch", "pillow", "safetensors", "lightning-fabric", "tensorboard"}


def requirements(image: str, pyproject: Path) -> list[str]:
    """The requirements of one image, or of the inventory, in the order of pyproject.toml. KeyError: no such image."""
    project = tomllib.loads(pyproject.read_text())["project"]
    if image == "inventory":
        return [each for each in project["optional-dependencies"]["dev"] if each.startswith(INVENTORY)]
    extras = EXTRAS[image]
    wanted: list[str] = project["dependencies"]
    if image == "light":
        wanted = [each for each in wanted if re.split(r"[^\w-]", each)[0] not in PIPELINE]
    return [*wanted, *(each for extra in extras for each in project["optional-dependencies"][extra])]


if __name__ == "__main__":
    sys.stdout.write("\n".join(requirements(sys.argv[1], Path("pyproject.toml"))) + "\n")
