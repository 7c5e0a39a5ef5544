"""The public interface of ``teacher_cache``, and the wheel beside a user's own folders of our names."""

from __future__ import annotations

import ast
import inspect
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


def test_the_wheel_installs_one_top_level_package(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"teacher_cache"}
    assert "teacher_cache/pipeline/configs/students/vit-s-32.json" in names
    assert "teacher_cache/pipeline/models/scenes_teacher/open_clip_config.json" in names


def test_the_wheel_works_beside_a_users_own_pipeline_storage_and_flows(wheel: Path, tmp_path: Path) -> None:
    """An empty environment gets the wheel; the dependencies lie on its path, our working tree does not."""
    venv.create(tmp_path / "env", with_pip=False)
    python = tmp_path / "env" / "bin" / "python"
    site = next((tmp_path / "env" / "lib").glob("python*")) / "site-packages"
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(site), str(wheel)]
    subprocess.run(command, check=True, capture_output=True)
    (site / "dependencies.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")  # its own .pth files are not read
    own = tmp_path / "project"
    for name in OWN_FOLDERS:
        (own / name).mkdir(parents=True)
        (own / name / "__init__.py").write_text(f"MINE = {name!r}\n")
    code = (
        "import teacher_cache, pipeline, storage, flows\n"
        "from teacher_cache import Cache, StudentRuntime, precompute\n"
        "from teacher_cache.pipeline.settings.names import presets\n"
        "assert [each.MINE for each in (pipeline, storage, flows)] == ['pipeline', 'storage', 'flows']\n"
        "assert 'vit-s-32' in presets()\n"
        "print(teacher_cache.__file__)\n"
    )
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([python, "-c", code], cwd=own, env=environment, capture_output=True, text=True, check=True)
    assert Path(done.stdout.strip()).is_relative_to(site)
    made = (
        "import sys; from teacher_cache.pipeline.cli.app import main; sys.argv = ['teacher-cache', 'ls', '.']; main()"
    )
    done = subprocess.run([python, "-c", made], cwd=own, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
