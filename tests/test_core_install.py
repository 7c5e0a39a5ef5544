"""``pip install teacher-cache`` inspects caches; a command of an extra names the line that installs it."""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.utils import canonicalize_name

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


@pytest.mark.parametrize("command", ["info", "stats", "verify", "ls"])
def test_the_core_install_inspects_a_cache(hidden: str, command: str) -> None:
    done = run(hidden, command, str(GOLDEN.parent if command == "ls" else GOLDEN))
    assert done.returncode == 0, done.stderr


def test_the_core_install_lists_all_commands(hidden: str) -> None:
    done = run(hidden, "--help")
    assert done.returncode == 0, done.stderr
    assert {"info", "precompute", "train", "deploy", "report"} <= set(done.stdout.split())


@pytest.mark.parametrize(
    ("words", "extra"),
    [
        (["precompute", "--dataset", "scenes:x", "--teacher", "bundled:scenes", "--cache", "{tmp}/c"], "train"),
        (["train", "--cache", "{golden}", "--student", "scenes-small", "--out", "{tmp}/r"], "train"),
        (["report", "{golden}"], "report"),
    ],
)
def test_a_missing_extra_is_named_with_its_install_line(
    hidden: str, words: list[str], extra: str, tmp_path: Path
) -> None:
    done = run(hidden, *(word.format(tmp=tmp_path, golden=GOLDEN) for word in words))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1, done.stderr
    assert f"pip install 'teacher-cache[{extra}]'" in done.stderr
