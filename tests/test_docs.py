"""What the documents say exists, exists: commands, flags, targets, files, links."""

from __future__ import annotations

import ast
import re
import subprocess
import tomllib
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import yaml

from teacher_cache.pipeline.cli import app as _app  # noqa: F401 - registers the commands
from teacher_cache.pipeline.data.datasets.adapters import ADAPTERS
from teacher_cache.pipeline.settings.names import presets
from teacher_cache.storage.cli.app import every_command
from tests.slow import CASES, LONGEST_FILES, cases_of

ROOT = Path(__file__).parents[1]
PROJECT_PAGES = ROOT / "docs" / "project"  # copies that the site is built from; not in git
DOCUMENTS = [ROOT / "README.md", ROOT / "ARCHITECTURE.md", ROOT / "docker" / "README.md"]
DOCUMENTS += [path for path in sorted((ROOT / "docs").rglob("*.md")) if not path.is_relative_to(PROJECT_PAGES)]
DOCUMENTS += [*sorted((ROOT / "benchmarks").glob("*.md")), *sorted((ROOT / "configs").glob("*.toml"))]


def tracked() -> list[str]:
    """Files of the project, as git or the working tree knows them."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False).stdout
    return listed.splitlines()


def code_in(path: Path) -> str:
    """What a document shows as typed: fenced blocks and inline code, or the whole of a file that is not prose."""
    text = path.read_text().replace("\\\n", " ")
    if path.suffix != ".md":
        return text
    fences = re.findall(r"^```([^\n`]*)\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    blocks = [block for kind, block in fences if not kind.startswith("{")]  # {toctree} and its like show nothing typed
    inline = re.findall(r"`([^`\n]+(?:\n[^`\n]+)?)`", re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL))
    return "\n".join([*blocks, *(code.replace("\n", " ") for code in inline)])


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_every_command_and_flag_shown_exists(path: Path) -> None:
    commands = dict(every_command())
    text = code_in(path)
    # behind " -- " are the words of another program
    for name, rest in re.findall(r"teacher-cache ((?:students? )?[a-z][a-z-]*)\b((?:(?! -- )[^\n`])*)", text):
        if name in ("student", "students") and not rest.strip(" ."):
            continue
        assert name in commands, f"{path.name}: teacher-cache {name}"
        command = commands[name]
        options = [[*parameter.opts, *parameter.secondary_opts] for parameter in command.params]
        known = {option for names in options for option in names} | {"--help"}
        assert set(re.findall(r"(?<!\S)--[a-z-]+", rest)) <= known, f"{path.name}: teacher-cache {name}{rest}"
        fields = set(getattr(command, "fields", ()))
        assert set(re.findall(r"--set ([a-z_0-9]+)", rest)) <= fields, f"{path.name}: teacher-cache {name}{rest}"
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for target in re.findall(r"(?:^|[;&|] )\s*make ([a-z-]+)\b", text, re.MULTILINE):
        assert target in targets, f"{path.name}: make {target}"


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_every_deployment_and_parameter_shown_exists(path: Path) -> None:
    known = {f"{found.name}/{name}": found for name, found in _deployments()}
    for name, rest in re.findall(r"prefect deployment (?:run|inspect|schedule [a-z]+) (\S+)([^\n`]*)", code_in(path)):
        assert name in known, f"{path.name}: prefect deployment ... {name}"
        given = re.findall(r"(?:-p|--param) '?([a-z_]+)=", rest)
        assert set(given) <= set(known[name].parameters.properties), f"{path.name}: {name}{rest}"


def _deployments() -> list[tuple[str, Any]]:
    """Name of each deployment in ``prefect.yaml`` with its flow."""
    listed = yaml.safe_load((ROOT / "prefect.yaml").read_text())["deployments"]
    found = []
    for entry in listed:
        file, function = entry["entrypoint"].split(":")
        module = import_module(file.removesuffix(".py").replace("/", "."))
        found.append((entry["name"], getattr(module, function)))
    return found


@pytest.mark.parametrize("path", [path for path in DOCUMENTS if path.suffix == ".md"], ids=lambda path: path.name)
def test_links_lead_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", path.read_text()):
        if "://" not in target:
            assert (path.parent / target).exists(), f"{path.name}: {target}"


def test_the_readme_names_every_package() -> None:
    """Each folder of Python modules is in the table "How it works", and nothing else is."""
    table = (ROOT / "README.md").read_text().split("| folder | what is in it |")[1].split("\n## ")[0]
    named = {name.strip("/") for row in table.splitlines() for name in re.findall(r"`([\w/]+/)`", row)}
    folders = {path.parent.as_posix() for path in map(Path, tracked()) if path.suffix == ".py"}
    shown = {
        f
        for f in folders
        if not f.startswith(("tests/", "docs", "benchmarks/")) and f not in ("pipeline", "storage", "docker", ".")
    }
    missing = {folder for folder in shown if not any(folder.endswith(name) for name in named)}
    assert not missing, f"not in the README: {sorted(missing)}"
    for name in named:
        assert any(folder.endswith(name) for folder in folders | {"configs", "docker"}), f"{name} is not in the project"


_TEST = re.compile(r"`(tests/[\w/]+\.py)::(test_\w+)`")


@cache
def _functions_in(path: Path) -> set[str]:
    """Names of the tests in a file, without importing it."""
    return {node.name for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef)}


def _promises() -> list[str]:
    promised = (ROOT / "docs" / "guarantees.md").read_text().partition("\n## Not promised\n")[0]
    return re.findall(r"^- (.*?)(?=^- |^#|\Z)", promised, re.MULTILINE | re.DOTALL)


def test_every_promise_names_tests_that_exist() -> None:
    text = (ROOT / "docs" / "guarantees.md").read_text()
    promises = _promises()
    assert len(promises) > 40
    for promise in promises:
        assert _TEST.search(promise), f"no test is named: {promise}"
    threats = (ROOT / "docs" / "threat-model.md").read_text()
    rows = re.findall(r"^\| (?!who |-).*", threats, re.MULTILINE)
    assert len(rows) >= 10
    assert all(_TEST.search(row) for row in rows)
    text += threats + (ROOT / "docs" / "design" / "029-faults.md").read_text()
    for path, name in _TEST.findall(text):
        assert name in _functions_in(ROOT / path), f"{path} has no {name}"
    # nothing that looks like a test and is written otherwise
    assert len(re.findall("::", text)) == len(_TEST.findall(text))


# how a promise begins -> why make test has no test of it
ONLY_IN_TEST_ALL = {
    "Killed from outside again and again": "minutes of kills; killed at seeded moments stays",
    "So is a missing right": "three runs of the command; the full disk takes the same way",
    "A flow run that is cancelled in Prefect": "a worker's process is waited for",
    "A rank that raises, is killed or hangs": "several groups of processes that import torch",
    "`deploy --web` gives": "needs Node.js",
    "`deploy --openvino` ships": "needs OpenVINO",
    "Two hosts with clocks": "needs network namespaces",
    "A host whose link to the store is cut": "needs network namespaces",
    "On a Ray cluster": "needs Ray",
    "A run whose GPU the server gave up": "needs a server that is killed",
    "A PostgreSQL that restarts": "needs PostgreSQL",
    "Two processes on a network that fails": "needs SeaweedFS behind a bad network for minutes",
    "Retraining copies no row from a cache of another dtype": "two retrainings",
}


def test_every_promise_is_tested_by_make_test() -> None:
    without = [
        promise
        for promise in _promises()
        if all(cases_of(f"{path}::{name}".removeprefix("tests/")) == 0 for path, name in _TEST.findall(promise))
    ]
    assert [promise for promise in without if not promise.startswith(tuple(ONLY_IN_TEST_ALL))] == []
    unused = [begin for begin in ONLY_IN_TEST_ALL if not any(promise.startswith(begin) for promise in without)]
    assert unused == [], "take them out of the list"


def test_adapters_and_presets_are_listed() -> None:
    assert all(f"| `{kind}` |" in (ROOT / "docs/reference/datasets.md").read_text() for kind in ADAPTERS)
    assert all(f"`{name}`" in (ROOT / "docs/howto/students.md").read_text() for name in presets())


def test_no_file_is_overlong_and_none_is_a_junk_drawer() -> None:
    for name in tracked():
        path = ROOT / name
        if path.suffix == ".py" and path.exists():
            assert path.name != "utils.py"
            assert len(path.read_text().splitlines()) <= 520, name


def test_every_entry_of_the_slow_tests_names_a_test() -> None:
    for entry in [*CASES, *LONGEST_FILES]:
        file, _, function = entry.partition("::")
        source = (ROOT / "tests" / file).read_text()
        assert not function or f"def {function.rpartition('::')[2]}(" in source, f"tests/slow.py: {entry}"


def test_the_page_on_installing_names_every_extra() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    table = (ROOT / "docs/howto/install.md").read_text().partition("| extra |")[2].partition("## ")[0]
    named = [
        name for cell in re.findall(r"^\| (`.*?) \|", table, re.MULTILINE) for name in re.findall(r"`([^`]+)`", cell)
    ]
    assert sorted(named) == sorted(extras)
