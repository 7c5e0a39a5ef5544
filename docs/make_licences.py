"""Print docs/licences.md: what an installation with all that the ``cpu`` image holds brings, and under which licence.

From the metadata of what is installed beside this Python; ``make licences`` writes the file, and a test compares.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

PROJECT = Path(__file__).resolve().parents[1]

_HEAD = """# Licences

What `pip install 'teacher-cache[{extras}]'` brings, by name, as the packages say of themselves. teacher-cache
is Apache-2.0. With CUDA torch also brings NVIDIA's libraries, under NVIDIA's terms, and Triton (MIT). Each image has a
list of its own, with versions, in `/usr/share/sbom/teacher-cache.cdx.json` (CycloneDX).

Made by `make licences`.

| package | licence |
|---|---|
"""
_LONGEST = 60  # of a field that is a name and not the text itself
_OF_CUDA = ("nvidia-", "cuda-", "triton", "pytorch-triton")


def closure(wanted: Iterable[str]) -> dict[str, Distribution]:
    """Distributions by name that these requirements bring here, themselves included.

    Raises:
        PackageNotFoundError: one of them, or of what it needs on this machine, is not installed.
    """
    found: dict[str, Distribution] = {}
    seen: set[tuple[str, frozenset[str]]] = set()
    left = [Requirement(each) for each in wanted]
    while left:
        requirement = left.pop()
        name = canonicalize_name(requirement.name)
        if name.startswith(_OF_CUDA) or (name, frozenset(requirement.extras)) in seen:
            continue
        seen.add((name, frozenset(requirement.extras)))
        found[name] = distribution(requirement.name)
        for each in found[name].requires or ():
            needed = Requirement(each)
            if needed.marker is None or any(
                needed.marker.evaluate({"extra": extra}) for extra in {"", *requirement.extras}
            ):
                left.append(needed)
    return dict(sorted(found.items()))


def licence_of(found: Distribution) -> str:
    """Return the licence of a distribution in one line."""
    metadata = found.metadata
    if expression := metadata.get("License-Expression"):
        return str(expression)
    classified = [
        each.split(" :: ")[-1] for each in metadata.get_all("Classifier") or () if each.startswith("License ::")
    ]
    named = [each for each in classified if each != "OSI Approved"]
    if named:
        return "; ".join(named)
    told = " ".join(str(metadata.get("License") or "").split())
    return told if 0 < len(told) <= _LONGEST else "in its files"


def main() -> None:
    """To stdout; exit 1 with a name if something is not installed."""
    sys.path.insert(0, str(PROJECT / "docker"))
    from requirements import EXTRAS, requirements

    try:
        found = closure(requirements("cpu", PROJECT / "pyproject.toml"))
    except PackageNotFoundError as error:
        sys.exit(f"{error.name} is not installed: run make dev first")
    lines = [f"| {name} | {licence_of(each).replace('|', '/')} |" for name, each in found.items()]
    sys.stdout.write(_HEAD.format(extras=",".join(EXTRAS["cpu"])) + "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
