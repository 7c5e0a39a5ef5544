"""What is installed is what was tested: locks, constraints, licences and the list of an image's packages agree."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import venv
from importlib.metadata import Distribution, distribution, version
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.container_files import DOCKER, PROJECT, script

LOCKS = {name: DOCKER / f"requirements-{name}.txt" for name in ("light", "inventory")}


def pins(path: Path) -> dict[str, dict[str, str]]:
    """By name, the marker of each pinned version; a name may have one for each range of Pythons."""
    found: dict[str, dict[str, str]] = {}
    for line in path.read_text().splitlines():
        if re.match(r"[a-zA-Z0-9]", line):
            requirement = Requirement(line.rstrip("\\ "))
            (version,) = requirement.specifier
            found.setdefault(canonicalize_name(requirement.name), {})[version.version] = str(requirement.marker or "")
    return found


def direct(image: str) -> list[Requirement]:
    wanted = script(DOCKER / "requirements.py").requirements(image, PROJECT / "pyproject.toml")
    return [Requirement(each) for each in wanted]


@pytest.mark.parametrize("name", LOCKS)
def test_a_lock_has_a_digest_for_every_version_and_no_address(name: str) -> None:
    text = LOCKS[name].read_text()
    entries = re.split(r"^(?=[a-zA-Z0-9])", text, flags=re.MULTILINE)[1:]
    assert len(entries) > 20
    for entry in entries:
        lines = entry.rstrip().splitlines()
        assert len(lines) > 1, f"{lines[0]} has no digest"
        assert all(re.fullmatch(r"    --hash=sha256:[0-9a-f]{64}( \\)?", line) for line in lines[1:]), entry
    assert "://" not in text
    assert "make lock" in text.splitlines()[1]


@pytest.mark.parametrize("name", LOCKS)
def test_a_lock_is_in_step_with_pyproject_and_constraints(name: str) -> None:
    """All that is wanted is there, at the constrained version; run ``make lock`` if not."""
    locked, constrained = pins(LOCKS[name]), pins(PROJECT / "constraints.txt")
    for requirement in direct(name):
        versions = locked[canonicalize_name(requirement.name)]
        assert all(requirement.specifier.contains(version) for version in versions), f"{requirement}: {set(versions)}"
    for package, versions in locked.items():
        assert set(versions) <= set(constrained[package]), f"{package}: {set(versions)}, constraints.txt has another"


def test_the_lock_of_the_light_image_is_complete_and_holds_nothing_else() -> None:
    """Against the metadata of what is installed here, which has the constrained versions."""
    licences = script(PROJECT / "docs" / "make_licences.py")
    needed: dict[str, Distribution] = licences.closure(map(str, direct("light")))
    locked = pins(LOCKS["light"])
    assert set(needed) <= set(locked), "run make lock"
    from packaging.markers import Marker

    here = {
        name for name, versions in locked.items() for mark in versions.values() if not mark or Marker(mark).evaluate()
    }
    assert here == set(needed), "run make lock"


@pytest.mark.parametrize("image", ["cpu", "gpu"])
def test_the_images_that_encode_have_each_decoder(image: str) -> None:
    assert {"pillow", "simplejpeg"} <= {canonicalize_name(each.name) for each in direct(image)}


def test_the_images_install_by_digest_and_list_what_they_hold() -> None:
    text = (DOCKER / "Dockerfile").read_text()
    for name in LOCKS:
        assert re.search(rf"--require-hashes -r requirements-{name}\.txt", text)
    finals = {re.search(r"AS ([\w-]+)", stage)[1]: stage for stage in re.split(r"^(?=FROM )", text, flags=re.M)[1:]}  # type: ignore[index]
    for image, inventory in (("light", "inventory"), ("cpu", "cpu-inventory"), ("gpu", "gpu-inventory")):
        assert f"COPY --from={inventory} /sbom.json /usr/share/sbom/teacher-cache.cdx.json" in finals[image]
        packages = re.search(r"COPY --from=(\S+) /opt/venv", finals[image])
        assert packages is not None
        assert finals[inventory].startswith(f"FROM {packages[1]} AS")
        assert "/opt/inventory" not in finals[image]


def command_of_the_inventory() -> list[str]:
    (found,) = set(re.findall(r"^RUN /opt/inventory/bin/(cyclonedx-py .*)$", (DOCKER / "Dockerfile").read_text(), re.M))
    return str(found).split()


def test_the_list_of_packages_is_valid_cyclonedx(tmp_path: Path) -> None:
    """The Dockerfile's own command, on a small environment instead of the image's: what some packages say is copied."""
    pytest.importorskip("cyclonedx_py", reason="pip install cyclonedx-bom")
    from cyclonedx.schema import SchemaVersion
    from cyclonedx.validation.json import JsonStrictValidator

    place, out = tmp_path / "venv", tmp_path / "sbom.json"
    venv.create(place, with_pip=False, symlinks=True)
    (packages,) = place.glob("lib/python*/site-packages")
    for name in ("zarr", "numpy", "numcodecs", "donfig"):
        (metadata,) = [each for each in distribution(name).files or () if each.name == "METADATA"]
        folder = packages / metadata.parent.name
        folder.mkdir()
        shutil.copy(str(metadata.locate()), folder)
    places = {"/sbom.json": str(out), "/opt/venv": str(place), "pyproject.toml": str(PROJECT / "pyproject.toml")}
    words = [places.get(word, word) for word in command_of_the_inventory()[1:]]
    done = subprocess.run([sys.executable, "-m", "cyclonedx_py", *words], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    text = out.read_text()
    found: dict[str, Any] = json.loads(text)
    validator = JsonStrictValidator(SchemaVersion.from_version(found["specVersion"]))
    assert validator.validate_str(text) is None
    assert found["metadata"]["component"]["name"] == "teacher-cache"
    components = {each["name"]: each for each in found["components"]}
    assert set(components) >= {"zarr", "numpy", "numcodecs", "donfig"}
    assert "prefect" not in components, "of the environment that is listed, not of the one that lists"
    assert components["zarr"]["version"] == version("zarr")
    assert components["zarr"]["licenses"]
    # so that the validation could fail
    assert validator.validate_str(text.replace('"bomFormat"', '"form"')) is not None


def test_the_page_of_licences_is_in_step() -> None:
    """Run ``make licences`` if not."""
    if sys.version_info[:2] != (3, 11):
        pytest.skip("markers of other Pythons bring other packages; the page is of 3.11, which the images have")
    script = PROJECT / "docs" / "make_licences.py"
    done = subprocess.run([sys.executable, script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    page = (PROJECT / "docs" / "licences.md").read_text()
    assert page == done.stdout
    rows = dict(re.findall(r"^\| ([a-z0-9-]+) \| (.+) \|$", page, re.MULTILINE))
    assert len(rows) > 100
    assert rows["numpy"].startswith("BSD-3-Clause")
    assert "Apache" in rows["prefect"]


def test_what_updates_dependencies_leaves_the_locks_to_us() -> None:
    settings = json.loads((PROJECT / "renovate.json").read_text())
    assert settings["ignorePaths"] == [str(path.relative_to(PROJECT)) for path in LOCKS.values()]
    (pattern,) = settings["pip_requirements"]["managerFilePatterns"]
    matched = re.compile(pattern.strip("/"))
    assert matched.search("constraints.txt")
    assert matched.search("docker/constraints.txt")
