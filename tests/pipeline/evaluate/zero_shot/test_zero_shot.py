"""Zero-shot accuracy of teacher and student, against open_clip's own classifier and against counting by hand."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from teacher_cache.pipeline.cli.evaluate import _accuracy_table
from teacher_cache.pipeline.data.images.decode import UndecodableImageError
from teacher_cache.pipeline.evaluate.zero_shot.measure import (
    Classification,
    TeacherEncoder,
    ZeroShotResult,
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
from teacher_cache.pipeline.train.loop import train
from teacher_cache.storage.errors import UsageError
from tests.conftest import make_model_folder, shared
from tests.pipeline.cli.test_cli import run
from tests.pipeline.train.train_work import make_student, train_config


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


def every(found: Classification) -> dict[str, float]:
    """Accuracies on all images that were classified."""
    return found.accuracies(common_rows(found))


class KnownEncoder:
    """Rows that a test can state: an image's is its one colour, a text's its words."""

    calls: tuple[int, ...] = ()

    def prepare(self, image: Image.Image) -> NDArray[Any]:
        if image.width > 20 * image.height:
            raise ValueError("too long a strip")
        return np.asarray(image)[0, 0]

    def embed_images(self, prepared: Sequence[NDArray[Any]]) -> NDArray[np.float32]:
        self.calls += (len(prepared),)
        return _unit(np.stack(prepared))

    def embed_texts(self, texts: Sequence[str]) -> NDArray[np.float32]:
        return _unit(np.array([[text.count(colour) for colour in ("red", "green", "blue")] for text in texts]))


def _unit(rows: NDArray[Any]) -> NDArray[np.float32]:
    wide = rows.astype(np.float32)
    unit: NDArray[np.float32] = wide / np.linalg.norm(wide, axis=1, keepdims=True)
    return unit


class KnownImages:
    """Plain images by colour; None is one that cannot be decoded."""

    name, prompts = "known", (("red", "all red"), ("green",), ("blue",))

    def __init__(self, colours: Sequence[tuple[int, int, int] | None], labels: Sequence[int]) -> None:
        self._colours, self.labels = colours, np.array(labels)
        self.sizes = [(4, 4)] * len(colours)

    def sample_id(self, index: int) -> str:
        return f"image {index}"

    def image(self, index: int) -> Image.Image:
        colour = self._colours[index]
        if colour is None:
            raise UndecodableImageError("no image")
        return Image.new("RGB", self.sizes[index], colour)


def test_any_encoder_is_measured() -> None:
    reddish, bluish = (200, 40, 10), (10, 40, 200)
    images = KnownImages([reddish, bluish, None, bluish, reddish, reddish], [0, 2, 0, 0, 1, 2])
    encoder, seen = KnownEncoder(), []
    found = classify_dataset(encoder, images, 2, lambda done, total: seen.append((done, total)))
    # of reddish, red is first, green second, blue third; of bluish the other way round
    assert found.place.tolist() == [0, 0, -1, 2, 1, 2]
    assert found.lost == {2: "image 2: no image"}
    rows = common_rows(found)
    assert rows.tolist() == [0, 1, 3, 4, 5]
    assert found.hits(rows).tolist() == [True, True, False, False, False]
    assert found.hits(rows, k=2).tolist() == [True, True, False, True, False]
    # classes 1 of 2, 0 of 1, 1 of 2
    assert every(found) == {"top-1": 40.0, "top-5": 100.0, "mean per class": pytest.approx(100 / 3)}
    assert seen[-1] == (6, 6)
    assert encoder.calls == (2, 1, 2)  # an image that cannot be used leaves its batch smaller
    for size in (1, 5, 100):
        assert classify_dataset(KnownEncoder(), images, size).place.tolist() == found.place.tolist()


def test_two_models_are_compared_on_the_same_images() -> None:
    both = KnownImages([(9, 1, 1), None, (1, 9, 1), (1, 1, 9)], [0, 1, 1, 0])
    strip = KnownImages([(9, 1, 1), (1, 1, 9), (1, 9, 1), (1, 1, 9)], [0, 1, 1, 0])
    strip.sizes = [(4, 4), (4, 4), (100, 1), (4, 4)]  # an encoder may refuse an image that can be decoded
    first = classify_dataset(KnownEncoder(), both)
    second = classify_dataset(KnownEncoder(), strip)
    assert second.lost == {2: "image 2: too long a strip"}
    same = common_rows(first, second)
    assert same.tolist() == [0, 3]
    assert first.accuracies(same)["top-1"] == second.accuracies(same)["top-1"] == 50.0
    with pytest.raises(ValueError, match="different datasets"):
        common_rows(first, classify_dataset(KnownEncoder(), KnownImages([(9, 1, 1)], [0])))
    with pytest.raises(UsageError, match="known: not one image can be used; the first: image 0: no image"):
        classify_dataset(KnownEncoder(), KnownImages([None, None], [0, 1]))


def test_what_cannot_be_scored() -> None:
    with pytest.raises(ValueError, match="labels from 3 to 3, and 3 classes have prompts"):
        classify_dataset(KnownEncoder(), KnownImages([(9, 1, 1)], [3]))
    with pytest.raises(ValueError, match="3 classes, of which 1 have no prompt"):
        class_weights(KnownEncoder().embed_texts, [["red"], [], ["blue"]])
    with pytest.raises(FloatingPointError, match="not finite"), np.errstate(invalid="ignore"):
        classify_dataset(KnownEncoder(), KnownImages([(0, 0, 0)], [0]))
    with pytest.raises(ValueError, match="over no images"):
        every(Classification(np.array([0]), np.array([-1]), {0: "lost"}))


def test_accuracies_are_those_of_scikit_learn_and_of_sorting() -> None:
    # what clip-benchmark reports; its own top-k does not run with numpy 2.4
    from sklearn.metrics import balanced_accuracy_score, roc_auc_score, top_k_accuracy_score

    rng = np.random.default_rng(3)
    image, weights = _unit(rng.standard_normal((200, 8))), _unit(rng.standard_normal((12, 8)))
    labels = rng.integers(0, 12, 200)
    found = classify_rows(image, weights, labels, {})
    scores = image @ weights.T
    assert every(found) == {
        "top-1": pytest.approx(100 * top_k_accuracy_score(labels, scores, k=1)),
        "top-5": pytest.approx(100 * top_k_accuracy_score(labels, scores, k=5)),
        "mean per class": pytest.approx(100 * balanced_accuracy_score(labels, scores.argmax(axis=1))),
    }
    assert every(found) == sorted_accuracy(scores, labels)
    two = classify_rows(np.round(image, 1), np.round(weights[:2], 1), labels % 2, {})  # rounded: some margins are equal
    assert len(set(two.margin.tolist())) < 200
    assert every(two)["ROC AUC"] == pytest.approx(100 * roc_auc_score(labels % 2, two.margin))
    # ties, which the lower class number wins, in both ways of counting
    ties = rng.integers(0, 3, (300, 9)).astype(np.float32)
    labels = rng.integers(0, 9, 300)
    tied = Classification(labels, places(ties, labels), {})
    assert every(tied) == sorted_accuracy(ties, labels)


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
    teacher, student = make_model_folder(tmp_path / "teacher"), make_student(tmp_path / "student.json")
    cache, dataset = str(tmp_path / "c"), f"imagefolder:{pictures}"
    precompute(PrecomputeConfig(dataset=dataset, teacher=f"local-dir:{teacher}", cache=cache, device="cpu"))
    train(train_config(Path(cache), student, tmp_path / "run", split="", epochs=1, batch_size=5))
    models = ("--teacher", f"local-dir:{teacher}", "--run", str(tmp_path / "run"))
    settings = ("--templates", "cifar10", "--cache", str(tmp_path / "zs"), "--batch-size", "3", "--device", "cpu")
    done = run("zero-shot", dataset, *models, *settings, "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert set(found["teacher"]) == set(found["student"]) == {"top-1", "top-5", "mean per class"}
    assert found["student"]["top-5"] == 100.0  # of three classes
    assert found["chance"] == {"top-1": 100 / 3, "top-5": 100.0, "mean per class": 100 / 3}
    assert len(found["prompts"]) == 18
    assert found["cache"] == str(tmp_path / "zs")
    assert found["learned_images"] == 10  # all of them
    assert "the student learned from 10 of these 10 images. Measure others: another --split" in done.stderr
    done = run("zero-shot", dataset, "--prompts", "pets", cwd=tmp_path)
    assert done.returncode == 2
    assert "nothing to measure" in done.stderr
    done = run("zero-shot", dataset, "--prompts", "pets", *models, cwd=tmp_path)
    assert done.returncode == 2
    assert "no class name is surely that of 'cat', 'dog', 'guinea_pig' (3 of 3 classes)" in done.stderr


@pytest.mark.parametrize(
    ("classes", "shown"), [(5, ["top-1", "mean per class"]), (6, ["top-1", "top-5", "mean per class"])]
)
def test_chance_is_shown_and_top_5_from_six_classes_on(classes: int, shown: list[str]) -> None:
    numbers = {"top-1": 100 / classes, "top-5": 100.0, "mean per class": 100 / classes}
    result = ZeroShotResult(
        **{"dataset": "imagefolder:a", "images": 12, "classes": classes, "prompts": ("a",), "undecodable": ()},
        **{"undecodable_images": 0, "teacher": numbers, "student": None, "chance": numbers, "seconds": 1},
        **dict.fromkeys(("teacher_name", "cache", "run")),
    )
    *_, headings, _, teacher, chance = _accuracy_table(result).lines(None)
    assert re.split(r"  +", headings.strip()) == shown
    assert [line.split()[0] for line in (teacher, chance)] == ["teacher", "chance"]


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
