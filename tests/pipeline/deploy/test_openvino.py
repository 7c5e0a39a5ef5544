"""``deploy --openvino``: what OpenVINO's CPU runtime makes of ``openvino/`` is what ONNX Runtime computes.

Each test runs in a process of its own: beside the libraries of all other tests OpenVINO once ended theirs.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from teacher_cache.pipeline.deploy import runtime
from teacher_cache.pipeline.deploy.formats.openvino_ir import load_openvino, write_openvino
from teacher_cache.pipeline.deploy.gates import least_cosine
from teacher_cache.pipeline.deploy.record import Deployment, DeploymentError
from teacher_cache.pipeline.deploy.run import deploy
from teacher_cache.pipeline.deploy.runtime import StudentRuntime
from teacher_cache.pipeline.settings.deploy import DeployConfig
from teacher_cache.pipeline.train.loop import train
from teacher_cache.storage.errors import UsageError
from tests.commands import run_command
from tests.pipeline.deploy.deployed import deploy_tiny
from tests.pipeline.train.train_work import make_cache, make_student, train_config
from tests.python_packages import install_beside

_ALONE = "TEACHER_CACHE_TEST_OPENVINO"
TEXTS = ["a photo of a dog", "blue", "two cats and twelve toys on a table", "sea"]


def alone(test: Callable[..., None]) -> Callable[..., None]:
    """Run a test in a process of its own."""
    if os.environ.get(_ALONE):
        return test

    def run() -> None:
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"{__file__}::{test.__name__}"]
        done = subprocess.run(command, env={**os.environ, _ALONE: "1"}, capture_output=True, text=True, check=False)
        assert "\n1 passed in " in done.stdout, done.stdout + done.stderr

    run.__name__, run.__doc__ = test.__name__, test.__doc__
    return run


@pytest.fixture(scope="module", autouse=True)
def packages(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The real package in a folder of its own: it has 180 MB."""
    folder = tmp_path_factory.mktemp("packages")
    if find_spec("openvino") is None:
        install_beside(folder, "openvino")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
        yield


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> StudentRuntime:
    folder = deploy_tiny(tmp_path_factory.mktemp("tiny"))
    write_openvino(folder, Deployment.read(folder))
    return StudentRuntime(folder, "openvino", threads=1, batch_size=3)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, tiny_teacher: Path) -> dict[str, str]:
    """Settings of ``deploy`` for a run."""
    folder = tmp_path_factory.mktemp("trained")
    config = train_config(make_cache(folder, tiny_teacher), make_student(folder / "s.json"), folder / "run", epochs=1)
    train(config)
    return {"run": str(folder / "run"), "teacher": f"local-dir:{tiny_teacher}", "rounds": "1", "threads": "1"}


def pictures(count: int) -> list[Image.Image]:
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 255, (40, 50, 3), np.uint8)) for _ in range(count)]


@alone
def test_features_are_those_of_onnx_runtime_for_any_batch_length_and_thread(student: StudentRuntime) -> None:
    onnx = StudentRuntime(student.folder)
    images = pictures(7)
    assert least_cosine(student.embed_images(images), onnx.embed_images(images)) > 0.99999
    assert least_cosine(student.embed_texts(TEXTS), onnx.embed_texts(TEXTS)) > 0.99999
    with ThreadPoolExecutor(4) as pool:  # each thread has its own request
        rows = list(pool.map(lambda image: student.embed_images([image])[0], images * 4))
    np.testing.assert_allclose(rows, np.tile(student.embed_images(images), (4, 1)), atol=1e-5)


@alone
def test_only_the_files_that_were_written_are_run(student: StudentRuntime, tmp_path: Path) -> None:
    folder = deploy_tiny(tmp_path)
    with pytest.raises(UsageError, match=r"no openvino file of the image tower: it was not made\. Use fp32"):
        StudentRuntime(folder, "openvino").embed_images(pictures(1))
    write_openvino(folder, Deployment.read(folder))
    made = {f"openvino/{tower}.{kind}" for tower in ("image", "text") for kind in ("bin", "xml")}
    assert made < {artefact.file for artefact in Deployment.read(folder).artefacts()}
    (folder / "openvino" / "image.xml").write_bytes((student.folder / "openvino" / "text.xml").read_bytes())
    with pytest.raises(DeploymentError, match=r"openvino/image\.xml: not the file that was deployed"):
        StudentRuntime(folder, "openvino").embed_images(pictures(1))


@alone
def test_what_computes_something_else_is_not_shipped(
    trained: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def shifted(*given: Any) -> Callable[[Any], Any]:
        run = load_openvino(*given)
        return lambda values: run(values) + 0.01

    monkeypatch.setattr(runtime, "load_openvino", shifted)
    settings = {**trained, "out": str(tmp_path / "out"), "int8": False, "openvino": True}
    with pytest.raises(DeploymentError, match=r"openvino/image\.bin: differs from .* Nothing was deployed"):
        deploy(DeployConfig.model_validate(settings))
    assert list(tmp_path.iterdir()) == []


@alone
def test_the_command_ships_it_measures_it_and_infer_runs_it(trained: dict[str, str], tmp_path: Path) -> None:
    words = [word for name, value in trained.items() for word in (f"--{name}", value)]
    done = run_command("deploy", *words, "--out", tmp_path / "out", "--no-int8", "--web", "--openvino", "--json")
    assert done.returncode == 0, done.stderr
    table, record = json.loads(done.stdout)["table"], Deployment.read(tmp_path / "out")
    assert [(row["name"], row["engine"]) for row in table["rows"][2:]] == [
        ("ONNX fp32", "ONNX Runtime"),
        ("OpenVINO", "OpenVINO"),
    ]
    gates = {gate["name"].partition(":")[0]: gate["found"] for gate in table["gates"]}
    assert min(gates["openvino/image.bin"], gates["openvino/text.bin"]) > 0.99999
    assert "openvino" in record.made_with
    for artefact in record.artefacts():
        record.proven(tmp_path / "out", artefact)
    pictures(1)[0].save(tmp_path / "a.png")
    asked = ("infer", tmp_path / "a.png", "--text", "a dog", "--text", "a cat", "--student", tmp_path / "out", "--json")
    answers = [json.loads(run_command(*asked, "--variant", name).stdout) for name in ("openvino", "fp32")]
    cosines = [answer["images"][0]["cosines"] for answer in answers]
    assert cosines[0] == pytest.approx(cosines[1], abs=1e-3)
