"""Zero-shot accuracy of teacher and student, against open_clip's own classifier and against counting by hand."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from teacher_cache.pipeline.evaluate import zero_shot as zero_shot_module
from teacher_cache.pipeline.evaluate.encoders import TeacherEncoder
from teacher_cache.pipeline.evaluate.labelled_images import UnusableImageError
from teacher_cache.pipeline.evaluate.zero_shot import (
    Classification,
    class_weights,
    classify_dataset,
    classify_rows,
    common_rows,
    places,
    zero_shot,
)
from teacher_cache.pipeline.models.teacher import load_teacher
from teacher_cache.pipeline.precompute.run import precompute
from teacher_cache.pipeline.settings.evaluate import ZeroShotConfig
from teacher_cache.pipeline.settings.precompute import PrecomputeConfig
from teacher_cache.pipeline.settings.train import TrainConfig
from teacher_cache.pipeline.train.loop import train
from teacher_cache.storage.errors import UsageError
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


def sorted_accuracy(scores: NDArray[Any], labels: NDArray[np.int64]) -> dict[str, float]:
    """Accuracies another way: by sorting all classes, equal scores by class number."""
    hits = np.argsort(-scores, axis=1, kind="stable") == labels[:, None]
    first = hits[:, 0]
    return {
        "top-1": 100 * float(first.mean()),
        "top-5": 100 * float(hits[:, :5].any(axis=1).mean()),
        "mean per class": 100 * float(np.mean([first[labels == label].mean() for label in np.unique(labels)])),
    }


def test_accuracy_by_hand() -> None:
    scores = np.array([[3, 2, 1], [3, 2, 1], [1, 1, 0], [0, 0, 1], [9, 8, 7]], np.float32)
    labels = np.array([0, 1, 0, 2, 2])
    found = Classification(labels, places(scores, labels), {})
    # first place: rows 0, 2 (a tie goes to the lower class) and 3; classes 2 of 2, 0 of 1, 1 of 2
    assert found.place.tolist() == [0, 1, 0, 0, 2]
    assert found.accuracies() == {"top-1": 60.0, "top-5": 100.0, "mean per class": 50.0}
    many, labels = np.tile(np.arange(10, dtype=np.float32), (4, 1)), np.array([9, 5, 4, 0])
    assert Classification(labels, places(many, labels), {}).accuracies()["top-5"] == 50.0


def test_class_weights_are_the_mean_of_unit_prompts() -> None:
    rows = {"a": [1.0, 0.0], "b": [0.0, 1.0], "c": [0.6, 0.8]}
    weights = class_weights(lambda texts: np.array([rows[text] for text in texts], np.float32), [["a", "b"], ["c"]])
    np.testing.assert_allclose(weights, [[np.sqrt(0.5), np.sqrt(0.5)], [0.6, 0.8]], atol=1e-6)


class KnownEncoder:
    """Rows that a test can state: an image's is its one colour, a text's its words."""

    calls: tuple[int, ...] = ()

    def embed_images(self, images: Sequence[Image.Image]) -> NDArray[np.float32]:
        if any(image.width > 20 * image.height for image in images):
            raise ValueError("too long a strip")
        self.calls += (len(images),)
        return _unit(np.stack([np.asarray(image)[0, 0] for image in images]))

    def embed_texts(self, texts: Sequence[str]) -> NDArray[np.float32]:
        return _unit(np.array([[text.count(colour) for colour in ("red", "green", "blue")] for text in texts]))


def _unit(rows: NDArray[Any]) -> NDArray[np.float32]:
    wide = rows.astype(np.float32)
    unit: NDArray[np.float32] = wide / np.linalg.norm(wide, axis=1, keepdims=True)
    return unit


class KnownImages:
    """Plain images by colour; None is one that cannot be decoded."""

    name = "known"

    def __init__(self, colours: Sequence[tuple[int, int, int] | None], labels: Sequence[int]) -> None:
        self._colours, self.labels = colours, np.array(labels)
        self.sizes = [(4, 4)] * len(colours)

    def sample_id(self, index: int) -> str:
        return f"image {index}"

    def image(self, index: int) -> Image.Image:
        colour = self._colours[index]
        if colour is None:
            raise UnusableImageError("no image")
        return Image.new("RGB", self.sizes[index], colour)


PROMPTS = [["red", "all red"], ["green"], ["blue"]]


def test_any_encoder_is_measured() -> None:
    reddish, bluish = (200, 40, 10), (10, 40, 200)
    images = KnownImages([reddish, bluish, None, bluish, reddish, reddish], [0, 2, 0, 0, 1, 2])
    encoder, seen = KnownEncoder(), []
    found = classify_dataset(encoder, images, PROMPTS, 2, lambda done, total: seen.append((done, total)))
    # of reddish, red is first, green second, blue third; of bluish the other way round
    assert found.place.tolist() == [0, 0, -1, 2, 1, 2]
    assert found.lost == {2: "image 2: no image"}
    assert found.rows.tolist() == [0, 1, 3, 4, 5]
    assert found.hits().tolist() == [True, True, False, False, False]
    assert found.hits(k=2).tolist() == [True, True, False, True, False]
    # classes 1 of 2, 0 of 1, 1 of 2
    assert found.accuracies() == {"top-1": 40.0, "top-5": 100.0, "mean per class": pytest.approx(100 / 3)}
    assert seen[-1] == (6, 6)
    assert encoder.calls == (2, 2, 1)
    for size in (1, 5, 100):
        assert classify_dataset(KnownEncoder(), images, PROMPTS, size).place.tolist() == found.place.tolist()


def test_two_models_are_compared_on_the_same_images() -> None:
    both = KnownImages([(9, 1, 1), None, (1, 9, 1), (1, 1, 9)], [0, 1, 1, 0])
    strip = KnownImages([(9, 1, 1), (1, 1, 9), (1, 9, 1), (1, 1, 9)], [0, 1, 1, 0])
    strip.sizes = [(4, 4), (4, 4), (100, 1), (4, 4)]  # an encoder may refuse an image that can be decoded
    first = classify_dataset(KnownEncoder(), both, PROMPTS)
    second = classify_dataset(KnownEncoder(), strip, PROMPTS)
    assert second.lost == {2: "image 2: too long a strip"}
    same = common_rows(first, second)
    assert same.tolist() == [0, 3]
    assert first.accuracies(same)["top-1"] == second.accuracies(same)["top-1"] == 50.0
    with pytest.raises(ValueError, match="different datasets"):
        common_rows(first, classify_dataset(KnownEncoder(), KnownImages([(9, 1, 1)], [0]), PROMPTS))
    with pytest.raises(UsageError, match="known: not one image can be used; the first: image 0: no image"):
        classify_dataset(KnownEncoder(), KnownImages([None, None], [0, 1]), PROMPTS)


def test_what_cannot_be_scored() -> None:
    with pytest.raises(ValueError, match="labels from 3 to 3, and 3 classes have prompts"):
        classify_dataset(KnownEncoder(), KnownImages([(9, 1, 1)], [3]), PROMPTS)
    with pytest.raises(ValueError, match="3 classes, of which 1 have no prompt"):
        class_weights(KnownEncoder().embed_texts, [["red"], [], ["blue"]])
    with pytest.raises(FloatingPointError, match="not finite"), np.errstate(invalid="ignore"):
        classify_dataset(KnownEncoder(), KnownImages([(0, 0, 0)], [0]), PROMPTS)
    with pytest.raises(ValueError, match="over no images"):
        Classification(np.array([0]), np.array([-1]), {0: "lost"}).accuracies()


def test_large_images_do_not_pile_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zero_shot_module, "_BATCH_PIXELS", 40)
    monkeypatch.setattr(zero_shot_module, "_DECODED_AT_ONCE", 1)
    encoder = KnownEncoder()
    found = classify_dataset(encoder, KnownImages([(9, 1, 1)] * 7, [0] * 7), PROMPTS, 6)
    assert encoder.calls == (3, 3, 1)  # of 16 pixels each
    assert found.accuracies()["top-1"] == 100.0


def test_accuracies_are_those_of_scikit_learn_and_of_sorting() -> None:
    # what clip-benchmark reports; its own top-k does not run with numpy 2.4
    from sklearn.metrics import balanced_accuracy_score, top_k_accuracy_score

    rng = np.random.default_rng(3)
    image, weights = _unit(rng.standard_normal((200, 8))), _unit(rng.standard_normal((12, 8)))
    labels = rng.integers(0, 12, 200)
    found = classify_rows(image, weights, labels, {})
    scores = image @ weights.T
    assert found.accuracies() == {
        "top-1": pytest.approx(100 * top_k_accuracy_score(labels, scores, k=1)),
        "top-5": pytest.approx(100 * top_k_accuracy_score(labels, scores, k=5)),
        "mean per class": pytest.approx(100 * balanced_accuracy_score(labels, scores.argmax(axis=1))),
    }
    assert found.accuracies() == sorted_accuracy(scores, labels)
    # ties, which the lower class number wins, in both ways of counting
    ties = rng.integers(0, 3, (300, 9)).astype(np.float32)
    labels = rng.integers(0, 9, 300)
    tied = Classification(labels, places(ties, labels), {})
    assert tied.accuracies() == sorted_accuracy(ties, labels)


def test_class_weights_equal_open_clips(tiny_teacher: Path) -> None:
    teacher = load_teacher(f"local-dir:{tiny_teacher}", device="cpu")
    names = ["cat", "dog", "guinea pig"]
    templates = open_clip.SIMPLE_IMAGENET_TEMPLATES

    def tokenizer(texts: list[str]) -> torch.Tensor:
        return torch.as_tensor(teacher.tokenizer(texts))

    wanted = open_clip.build_zero_shot_classifier(teacher.model, tokenizer, names, templates).T.numpy()
    prompts = [[template(name) for template in templates] for name in names]
    exact = class_weights(lambda texts: teacher.text_features(teacher.tokenizer(list(texts))).numpy(), prompts)
    np.testing.assert_allclose(exact, wanted, atol=1e-5)
    # as a cache holds them: rounded to float16
    np.testing.assert_allclose(class_weights(TeacherEncoder(teacher).embed_texts, prompts, 5), wanted, atol=1e-3)


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
    assert result.teacher == sorted_accuracy((image @ weights).numpy(), labels)
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
    settings = ("--templates", "cifar10", "--cache", str(tmp_path / "zs"), "--batch-size", "3", "--device", "cpu")
    done = subprocess.run(
        [sys.executable, "-m", "teacher_cache.pipeline.cli.app", "zero-shot", dataset, *models, *settings, "--json"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert set(found["teacher"]) == set(found["student"]) == {"top-1", "top-5", "mean per class"}
    assert found["student"]["top-5"] == 100.0  # of three classes
    assert len(found["prompts"]) == 18
    assert found["cache"] == str(tmp_path / "zs")
    done = subprocess.run(
        [sys.executable, "-m", "teacher_cache.pipeline.cli.app", "zero-shot", dataset, "--prompts", "pets"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "nothing to measure" in done.stderr
    done = subprocess.run(
        [sys.executable, "-m", "teacher_cache.pipeline.cli.app", "zero-shot", dataset, "--prompts", "pets", *models],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "no class name is surely that of 'cat', 'dog', 'guinea_pig' (3 of 3 classes)" in done.stderr


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
