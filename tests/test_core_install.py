"""``pip install teacher-cache`` inspects caches; a command of an extra names the line that installs it."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import Any

import pytest
from packaging.utils import canonicalize_name

from teacher_cache.storage.errors import install_line
from tests.container_files import PROJECT, script

# the command, in a Python that finds the standard library and the core install alone
CORE_ONLY = """
import json, sys
hidden = set(json.loads(sys.argv.pop(1)))
class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in hidden:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Hidden())
from teacher_cache.pipeline.cli.app import main
main()
"""
GOLDEN = PROJECT / "tests" / "golden" / "v1" / "sealed"


@pytest.fixture(scope="module")
def hidden() -> str:
    """Import names that only extras bring."""
    project = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]
    core = set(script(PROJECT / "docs" / "make_licences.py").closure(project["dependencies"]))
    names = packages_distributions()
    assert "torch" in names
    return json.dumps(
        [
            name
            for name, brought_by in names.items()
            if name != "teacher_cache" and not {canonicalize_name(each) for each in brought_by} & core
        ]
    )


def run(hidden: str, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", CORE_ONLY, hidden, *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("command", ["info", "stats", "verify", "info of a folder"])
def test_the_core_install_inspects_a_cache(hidden: str, command: str) -> None:
    done = run(hidden, command.split()[0], str(GOLDEN.parent if "folder" in command else GOLDEN))
    assert done.returncode == 0, done.stderr


def test_the_core_install_lists_all_commands(hidden: str) -> None:
    done = run(hidden, "--help")
    assert done.returncode == 0, done.stderr
    assert {"info", "precompute", "train", "deploy", "report"} <= set(done.stdout.split())


_MAKE = "--dataset scenes:x --teacher bundled:scenes"


@pytest.mark.parametrize(
    ("command", "extra"),
    [
        (f"precompute {_MAKE} --cache {{tmp}}/c", "train"),
        (f"precompute {_MAKE} --cache {{tmp}}/c --dry-run", "train"),
        (f"precompute {_MAKE} --cache {{tmp}}/c --executor ray", "ray"),
        (f"precompute {_MAKE} --cache {{tmp}}/c --decoder jpeg-scaled", "fastjpeg"),
        ("info s3://bucket/c", "s3"),
        (f"import {{tmp}} {_MAKE} --cache {{tmp}}/c", "train"),
        ("verify {golden} --sample 2", "train"),
        ("evaluate --cache {golden}", "train"),
        ("train --cache {golden} --image-root {tmp} --student scenes-small --out {tmp}/r", "train"),
        ("student inherit --teacher bundled:scenes --student scenes-small --out {tmp}/i", "train"),
        ("student cost --teacher bundled:scenes", "train"),
        ("student pixels --cache {golden} --image-root {tmp} --student scenes-small --out {tmp}/p", "train"),
        (f"students retrain {_MAKE} --home {{tmp}}/h --student scenes-small", "train"),
        ("demo --out {tmp}/d", "train"),
        ("infer {golden}/manifest.json --text a --student {tmp}", "train"),
        ("report {golden} --out {tmp}/r.html", "report"),
        ("index {golden} --out {tmp}/i", "train"),
    ],
)
def test_a_missing_extra_is_named_with_its_install_line(hidden: str, command: str, extra: str, tmp_path: Path) -> None:
    (tmp_path / "img-0.jpg").touch()  # a picture of the golden cache, which is asked for first
    done = run(hidden, *command.format(tmp=tmp_path, golden=GOLDEN).split())
    assert (done.returncode, done.stdout) == (2, ""), done.stderr
    *progress, last = done.stderr.splitlines()
    assert len(progress) <= command.startswith("verify"), done.stderr
    assert re.fullmatch(rf"error: .* needs .*, which is not installed: .*pip install .*\[{extra}\]'", last)


@pytest.mark.parametrize(
    ("origin", "wanted"),
    [
        (None, "'teacher-cache[report]'"),
        ({"url": "https://index/x.whl", "archive_info": {}}, "'teacher-cache[report]'"),
        ({"url": "file:///my%20code", "dir_info": {"editable": True}}, "-e '/my code[report]'"),
        ({"url": "file:///code", "dir_info": {}}, "'/code[report]'"),
    ],
)
def test_the_install_line_fits_how_it_was_installed(
    origin: dict[str, Any] | None, wanted: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    info = tmp_path / "teacher_cache-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Name: teacher-cache\nVersion: 1\n")
    if origin is not None:
        (info / "direct_url.json").write_text(json.dumps(origin))
    monkeypatch.syspath_prepend(str(tmp_path))
    command, _, what = install_line("altair").partition(" install ")
    assert what == wanted
    assert command in (f"{sys.prefix}/bin/pip", f"{sys.executable} -m pip")
    assert install_line("other.module").endswith("pip install other")
