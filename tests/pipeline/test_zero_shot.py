"""Zero-shot accuracy of teacher and student, against open_clip's own classifier and against counting by hand."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image

from pipeline.config import PrecomputeConfig, TrainConfig, ZeroShotConfig
from pipeline.metrics import classification_accuracy
from pipeline.precompute import precompute
from pipeline.train import train
from pipeline.zero_shot import class_weights, zero_shot
from storage.errors import UsageError
from tests.conftest import TINY_MODEL, make_model_folder, shared


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Three classes of 4, 4 and 2 pictures, and one file that is no picture."""
    root = tmp_path / "pictures"
    for number, (name, count) in enumerate((("cat", 4), ("guinea_pig", 4), ("dog", 2))):
        (root / name).mkdir(parents=True)
        for index in range(count):
            colours = np.random.default_rng([number, index]).integers(0, 256, (4, 4, 3)).astype(np.uint8)
            picture = Image.fromarray(colours).resize((50, 40), Image.Resampling.BICUBIC)
            picture.save(root / name / f"{index}.png")
    return root


def test_accuracy_by_hand() -> None:
    scores = np.array([[3.0, 2, 1], [3, 2, 1], [1, 1, 0], [0, 0, 1], [9, 8, 7]])
    labels = np.array([0, 1, 0, 2, 2])
    found = classification_accuracy(scores, labels)
    # first place: rows 0, 2 (a tie goes to the lower class) and 3; classes 2 of 2, 0 of 1, 1 of 2
    assert found == {"top-1": 60.0, "top-5": 100.0, "mean per class": 50.0}
    many = np.tile(np.arange(10.0), (4, 1))
    assert classification_accuracy(many, np.array([9, 5, 4, 0]))["top-5"] == 50.0


def test_accuracy_of_nothing_or_of_nan_is_refused() -> None:
    with pytest.raises(ValueError, match="0 rows of scores"):
        classification_accuracy(np.empty((0, 3)), np.empty(0, np.int64))
    with pytest.raises(ValueError, match="must be finite"):
        classification_accuracy(np.array([[np.nan, 1.0]]), np.array([0]))
    with pytest.raises(ValueError, match=r"labels in 0 ... 1"):
        classification_accuracy(np.zeros((1, 2)), np.array([2]))


def test_class_weights_are_the_mean_of_unit_prompts() -> None:
    rows = {"a": [1.0, 0.0], "b": [0.0, 1.0], "c": [0.6, 0.8]}
    weights = class_weights(lambda texts: np.array([rows[text] for text in texts], np.float32), [["a", "b"], ["c"]])
    np.testing.assert_allclose(weights, [[np.sqrt(0.5), np.sqrt(0.5)], [0.6, 0.8]], atol=1e-6)


def test_the_teacher_is_measured_as_open_clip_does(pictures: Path, tiny_teacher: Path) -> None:
    result = zero_shot(
        ZeroShotConfig(
            dataset=f"imagefolder:{pictures}?templates=simple", teacher=f"local-dir:{tiny_teacher}", device="cpu"
        )
    )
    model, _, transform = open_clip.create_model_and_transforms(f"local-dir:{tiny_teacher}")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{tiny_teacher}", context_length=16)
    names = ["cat", "dog", "guinea pig"]
    with torch.no_grad():
        weights = open_clip.build_zero_shot_classifier(
            model.eval(), tokenizer, names, open_clip.SIMPLE_IMAGENET_TEMPLATES
        )
        paths = sorted(pictures.glob("*/*.png"))
        image = model.encode_image(torch.stack([transform(Image.open(path)) for path in paths]), normalize=True)
    labels = np.array([names.index(path.parent.name.replace("_", " ")) for path in paths])
    assert result.teacher == classification_accuracy((image @ weights).numpy(), labels)
    assert result.student is None
    assert (result.images, result.classes, len(result.prompts)) == (10, 3, 7)
    assert result.prompts[0] == "itap of a cat."


def test_an_undecodable_image_is_left_out_and_named(pictures: Path, tiny_teacher: Path) -> None:
    settings = ZeroShotConfig(dataset=f"imagefolder:{pictures}", teacher=f"local-dir:{tiny_teacher}", device="cpu")
    whole = zero_shot(settings)
    (pictures / "cat" / "9.png").write_bytes(b"no picture")
    result = zero_shot(settings.model_copy(update={"batch_size": 3}))
    assert (result.images, result.undecodable_images) == (10, 1)
    assert result.undecodable[0].startswith("cat/9.png: not an image")
    assert result.teacher == whole.teacher


def test_what_cannot_be_measured(pictures: Path, tiny_teacher: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="nothing to measure: give --run, --teacher or both"):
        zero_shot(ZeroShotConfig(dataset=f"imagefolder:{pictures}"))
    seen: list[str] = []
    both = ZeroShotConfig(
        dataset=f"imagefolder:{pictures}", teacher=f"local-dir:{tiny_teacher}", run=str(tmp_path / "no"), device="cpu"
    )
    with pytest.raises(UsageError, match="no: no run here"):
        zero_shot(both, lambda stage, done, total: seen.append(stage))
    assert not seen  # before the teacher has worked for nothing
    (tmp_path / "one").mkdir()
    (pictures / "cat").rename(tmp_path / "one" / "cat")
    with pytest.raises(UsageError, match="there is one class"):
        zero_shot(ZeroShotConfig(dataset=f"imagefolder:{tmp_path / 'one'}", teacher=f"local-dir:{tiny_teacher}"))


def test_the_command_measures_teacher_and_student(pictures: Path, tmp_path: Path) -> None:
    teacher, student = make_model_folder(tmp_path / "teacher"), tmp_path / "student.json"
    student.write_text(json.dumps({**TINY_MODEL, "embed_dim": 12}))
    cache, dataset = str(tmp_path / "c"), f"imagefolder:{pictures}"
    precompute(PrecomputeConfig(dataset=dataset, teacher=f"local-dir:{teacher}", cache=cache, device="cpu"))
    train(
        TrainConfig(
            cache=cache,
            student=str(student),
            out=str(tmp_path / "run"),
            split="",
            epochs=1,
            batch_size=5,
            workers=0,
        )
    )
    models = ("--teacher", f"local-dir:{teacher}", "--run", str(tmp_path / "run"))
    done = subprocess.run(
        [sys.executable, "-m", "pipeline.cli", "zero-shot", dataset, *models, "--device", "cpu", "--json"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert set(found["teacher"]) == set(found["student"]) == {"top-1", "top-5", "mean per class"}
    assert found["student"]["top-5"] == 100.0  # of three classes


@pytest.mark.real_data
def test_a_real_teacher_tells_cifar10_apart() -> None:
    result = zero_shot(
        ZeroShotConfig(
            dataset=f"imagefolder:{shared('cifar10')}", teacher=f"local-dir:{shared('teacher-flickr8k')}", device="cpu"
        )
    )
    assert (result.images, result.classes) == (1000, 10)
    assert result.teacher is not None
    assert (
        result.teacher["top-1"] > 15
    )  # chance is 10; this teacher knows captions, and has seen no picture of 32 pixels
    # as many pictures of each class
    assert result.teacher["top-1"] == pytest.approx(result.teacher["mean per class"])
