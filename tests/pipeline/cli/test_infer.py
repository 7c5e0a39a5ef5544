"""The infer command: what it prints, and what it does with images that cannot be read."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from teacher_cache.pipeline.cli.app import main
from teacher_cache.pipeline.deploy.runtime import StudentRuntime
from tests.conftest import write_photos

TEXTS = ["a cat", "a dog", "[red]snow[/red]"]


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with three photographs and a text file."""
    folder = write_photos(tmp_path_factory.mktemp("photos") / "a", 3) / "images"
    (folder / "notes.txt").write_text("no image")
    return folder


Infer = Callable[..., tuple[int, str, str]]


@pytest.fixture
def infer(tiny_deployment: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Infer:
    """Runs the command in this process: exit code, stdout, stderr."""

    def run(*words: str | Path, texts: Sequence[str] = TEXTS, student: Path = tiny_deployment) -> tuple[int, str, str]:
        given = [*words, *options(texts), "--student", student]
        monkeypatch.setattr(sys, "argv", ["teacher-cache", "infer", *map(str, given)])
        monkeypatch.setenv("COLUMNS", "200")
        with pytest.raises(SystemExit) as ended:
            main()
        return int(ended.value.code or 0), *capsys.readouterr()

    return run


def options(texts: Sequence[str]) -> list[str]:
    return [part for text in texts for part in ("--text", text)]


def test_json_has_every_number(infer: Infer, tiny_deployment: Path, photos: Path) -> None:
    found: Any = json.loads(infer(photos, "--json")[1])
    names = [str(photos / f"{number:04d}.jpg") for number in range(3)]
    assert [image["image"] for image in found["images"]] == names
    assert (found["texts"], found["variant"], found["unreadable"]) == (TEXTS, "fp32", [])
    student = StudentRuntime(tiny_deployment)
    wanted = student.classify(names, TEXTS)
    assert np.abs(np.array([image["probabilities"] for image in found["images"]]) - wanted).max() < 1e-5
    assert found["logit_scale"] == student.deployment.logit_scale == 14.3
    sharper: Any = json.loads(infer(photos, "--json", "--logit-scale", "100")[1])
    wanted = student.classify(names, TEXTS, scale=100)
    assert np.abs(np.array([image["probabilities"] for image in sharper["images"]]) - wanted).max() < 1e-5
    cosines = student.embed_images(names) @ student.embed_texts(TEXTS).T
    assert np.abs(np.array([image["cosines"] for image in found["images"]]) - cosines).max() < 1e-5


def test_the_table_has_the_likeliest_first(infer: Infer, tiny_deployment: Path, photos: Path) -> None:
    image = photos / "0001.jpg"
    code, out, _ = infer(image)
    assert code == 0
    shown = [line for line in out.splitlines() if re.search(r"\d\.\d{3} +\d+\.\d\s*$", line)]
    student = StudentRuntime(tiny_deployment)
    [likely] = student.classify([image], TEXTS)
    [cosines] = student.embed_images([image]) @ student.embed_texts(TEXTS).T
    assert len(shown) == 3
    for line, text in zip(shown, np.argsort(-likely), strict=True):
        assert TEXTS[text] in line
        assert line.split()[-2:] == [f"{cosines[text]:.3f}", f"{100 * likely[text]:.1f}"]
    assert str(image) in shown[0]


def test_many_texts_are_cut_and_one_shows_its_cosine(infer: Infer, tiny_deployment: Path, photos: Path) -> None:
    image = photos / "0000.jpg"
    assert "... and 4 more; --json has all" in infer(image, texts=[f"number {number}" for number in range(9)])[1]
    student = StudentRuntime(tiny_deployment)
    cosine = float((student.embed_images([image]) @ student.embed_texts(["a cat"]).T).item())
    assert f"{cosine:.3f}" in infer(image, texts=["a cat"])[1]


def test_of_a_sigmoid_student_one_text_has_a_probability(
    infer: Infer, tiny_deployment: Path, photos: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(tiny_deployment, tmp_path / "copy")
    record = json.loads((folder / "deploy.json").read_text()) | {"logit_bias": -1.0}
    (folder / "deploy.json").write_text(json.dumps(record))
    image = photos / "0000.jpg"
    found: Any = json.loads(infer(image, "--json", texts=["a cat"], student=folder)[1])
    [[cosine], [likely]] = (found["images"][0][name] for name in ("cosines", "probabilities"))
    assert found["logit_bias"] == -1.0
    assert likely == pytest.approx(1 / (1 + math.exp(1 - 14.3 * cosine)), rel=1e-5)
    out = infer(image, texts=["a cat"], student=folder)[1]
    assert "logit scale 14.3, bias -1.0: each text by itself" in out
    assert re.search(rf"{cosine:.3f} +{100 * likely:.1f}\s*$", out, re.MULTILINE)


def test_an_image_that_cannot_be_read_is_named_and_the_others_answered(
    infer: Infer, photos: Path, tmp_path: Path
) -> None:
    (tmp_path / "bad.jpg").write_bytes(b"no image")
    given = [photos / "0000.jpg", tmp_path / "bad.jpg", tmp_path / "none.jpg", photos / "0002.jpg"]
    code, out, err = infer(*given, "--json")
    assert code == 1
    assert [Path(image["image"]).name for image in json.loads(out)["images"]] == ["0000.jpg", "0002.jpg"]
    assert f"left out: {tmp_path}/bad.jpg: not an image" in err
    assert "none.jpg" in err
    assert len(err.splitlines()) == len(json.loads(out)["unreadable"]) == 2
    assert infer(tmp_path / "bad.jpg")[:2] == (1, "")


def test_more_images_than_one_batch(infer: Infer, photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("teacher_cache.pipeline.cli.deploy._BATCH", 2)
    code, out, _ = infer(photos, photos / "notes.txt", photos / "0001.jpg", "--json")
    assert code == 1
    found = json.loads(out)["images"]
    assert [Path(image["image"]).name for image in found] == ["0000.jpg", "0001.jpg", "0002.jpg", "0001.jpg"]
    assert found[1]["probabilities"] == pytest.approx(found[3]["probabilities"], abs=1e-5)


def test_what_cannot_be_used_ends_with_2(infer: Infer, photos: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("")
    for (code, _, err), said in (
        (infer(tmp_path), "no images in this folder, only a.txt; an image ends in .jpg"),
        (infer(photos, "--variant", "int8"), "no int8 file of the text tower: its features lose too much"),
        (infer(photos, "--variant", "fp16"), "'fp16' is not one of 'fp32', 'int8'"),
        (infer(photos, student=tmp_path), "no deployed student here"),
        (infer(photos, texts=[]), "Missing option '--text'"),
    ):
        assert (code, said in err) == (2, True), err


def test_damage_ends_with_1(infer: Infer, tiny_deployment: Path, photos: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_deployment, tmp_path / "copy")
    (folder / "image.onnx").write_bytes(b"")
    code, _, err = infer(photos, student=folder)
    assert (code, "image.onnx: not the file that was deployed" in err) == (1, True), err


def test_the_command_needs_no_torch(tiny_deployment: Path, photos: Path) -> None:
    code = (
        "import sys\n"
        "blocked = dict.fromkeys(('torch', 'torchvision', 'open_clip', 'transformers', 'pyarrow', 'zarr'))\n"
        "sys.modules.update(blocked)\n"  # importing one of them raises
        "from teacher_cache.pipeline.cli.app import main\n"
        "main()\n"
    )
    arguments = ["infer", str(photos), "--student", str(tiny_deployment), *options(TEXTS)]
    environment = {"PYTHONPATH": str(Path(__file__).parents[3]), "COLUMNS": "200"}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code, *arguments], env=environment, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "0002.jpg" in done.stdout
