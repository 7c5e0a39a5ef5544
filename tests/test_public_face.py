"""The public interface of ``teacher_cache``, and the wheel beside a user's own folders of our names."""

from __future__ import annotations

import ast
import inspect
import json
import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

import teacher_cache

ROOT = Path(__file__).parents[1]
OWN_FOLDERS = ("pipeline", "storage", "flows")


@pytest.mark.parametrize("name", teacher_cache.__all__)
def test_each_public_name_loads_and_is_documented(name: str) -> None:
    value = getattr(teacher_cache, name)
    assert inspect.getdoc(value), name
    assert name in dir(teacher_cache)


def test_type_checkers_see_the_names_that_are_loaded() -> None:
    block = next(node for node in ast.parse(Path(teacher_cache.__file__).read_text()).body if isinstance(node, ast.If))
    seen = {alias.asname for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert seen == set(teacher_cache.__all__)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="'precomputed'"):
        teacher_cache.precomputed  # noqa: B018


def test_importing_it_imports_no_dependency() -> None:
    code = "import sys, teacher_cache; sys.exit(bool({'numpy', 'pydantic', 'torch', 'zarr'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the wheel as ``pip install .`` does, from a copy of the tracked files without build isolation."""
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*command, "--wheel-dir", str(out), str(ROOT)], check=True, capture_output=True)
    return next(out.glob("teacher_cache-*.whl"))


def test_the_wheel_installs_one_top_level_package_with_its_data_and_licence(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as content:
        names = content.namelist()
        metadata, licence = (
            next(name for name in names if name.endswith(end)) for end in ("/METADATA", "/licenses/LICENSE")
        )
        assert content.read(licence) == (ROOT / "LICENSE").read_bytes()
        assert "\nLicense-Expression: Apache-2.0\nLicense-File: LICENSE\n" in content.read(metadata).decode()
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"teacher_cache"}
    # the report's page, the shipped teacher, prompts and presets among them
    tracked = subprocess.run(["git", "ls-files", *OWN_FOLDERS, "configs"], cwd=ROOT, capture_output=True, text=True)
    wanted = {name.replace("configs/", "pipeline/configs/", 1) for name in tracked.stdout.split()}
    assert len(wanted) > 200
    assert {f"teacher_cache/{name}" for name in wanted} <= set(names)


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment with the wheel; the dependencies lie on its path, our working tree does not."""
    environment = tmp_path_factory.mktemp("installed")
    venv.create(environment, with_pip=False)
    python = environment / "bin" / "python"
    command = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-deps", str(wheel)]
    subprocess.run(command, check=True, capture_output=True)
    site = next((environment / "lib").glob("python*")) / "site-packages"
    (site / "dependencies.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")  # its own .pth files are not read
    # read at each start; the line hides torch
    (site / "hidden.pth").write_text(
        "import os, sys; sys.modules.update({'torch': None} if 'NO_TORCH' in os.environ else {})\n"
    )
    return environment


def run(program: Path, *words: str, cwd: Path, **variables: str) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | variables
    done = subprocess.run([program, *words], cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_wheel_works_beside_a_users_own_pipeline_storage_and_flows(installed: Path, tmp_path: Path) -> None:
    for name in OWN_FOLDERS:
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(f"MINE = {name!r}\n")
    code = (
        "import teacher_cache, pipeline, storage, flows\n"
        "from teacher_cache import Cache, StudentRuntime, precompute\n"
        "from teacher_cache.pipeline.settings.names import presets\n"
        "assert [each.MINE for each in (pipeline, storage, flows)] == ['pipeline', 'storage', 'flows']\n"
        "assert 'vit-s-32' in presets()\n"
        "print(teacher_cache.__file__)\n"
    )
    place = run(installed / "bin" / "python", "-c", code, cwd=tmp_path).strip()
    assert Path(place).is_relative_to(installed)
    assert "teacher-cache" in run(installed / "bin" / "teacher-cache", "--help", cwd=tmp_path)


def test_the_installed_command_inspects_a_cache_without_torch(installed: Path, tmp_path: Path) -> None:
    cache = ROOT / "tests" / "golden" / "v3" / "sealed"
    told = run(installed / "bin" / "teacher-cache", "info", str(cache), "--json", cwd=tmp_path, NO_TORCH="1")
    assert json.loads(told)["manifest_digest"] == json.loads((cache / "manifest.json").read_bytes())["digest"]
