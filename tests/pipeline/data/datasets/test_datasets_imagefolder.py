"""Class folders with captions from prompt templates."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from teacher_cache.pipeline.data.datasets.prompts import DEFAULT_TEMPLATES
from teacher_cache.pipeline.data.datasets.records import Sample
from teacher_cache.pipeline.data.datasets.samples import load_samples
from teacher_cache.pipeline.data.datasets.spec import DatasetSpec, check_dataset
from teacher_cache.storage.errors import UsageError
from tests.conftest import shared
from tests.pipeline.data.dataset_files import load, read, save_image, told


@pytest.fixture
def pets(tmp_path: Path) -> Path:
    root = tmp_path / "pets"
    for number, name in enumerate(("great_dane/2.jpg", "great_dane/10.PNG", "cat/1.webp", "cat/more/0.jpg")):
        save_image(root / name, number)
    return root


def test_paths_in_order_with_default_captions(pets: Path) -> None:
    samples, problems = read("imagefolder", pets)
    assert problems == []
    cat = ("a photo of a cat.", "a photo of the cat.", "a good photo of a cat.")
    dane = ("a photo of a great dane.", "a photo of the great dane.", "a good photo of a great dane.")
    assert samples == [
        Sample("cat/1.webp", "cat/1.webp", "", cat),
        Sample("cat/more/0.jpg", "cat/more/0.jpg", "", cat),
        Sample("great_dane/10.PNG", "great_dane/10.PNG", "", dane),
        Sample("great_dane/2.jpg", "great_dane/2.jpg", "", dane),
    ]
    assert len(load_samples(DatasetSpec.parse(f"imagefolder:{pets}"))[1]) == 4
    assert {sample.split for sample in read("imagefolder", pets, split="mine")[0]} == {"mine"}


@pytest.mark.parametrize(("train", "other"), [("train", "val"), ("Train", "TEST")])
def test_a_level_of_splits_however_they_are_written(tmp_path: Path, train: str, other: str) -> None:
    for number, name in enumerate((f"{other}/cat/1.jpg", f"{train}/dog/2.jpg", f"{train}/cat/3.jpg")):
        save_image(tmp_path / name, number)
    samples, problems = read("imagefolder", tmp_path)
    assert read("imagefolder", tmp_path, split="mine")[0] == samples  # for images in no folder of a split
    assert [(sample.sample_id, sample.split, sample.captions[0]) for sample in samples] == sorted(
        [
            (f"{train}/cat/3.jpg", "train", "a photo of a cat."),
            (f"{train}/dog/2.jpg", "train", "a photo of a dog."),
            (f"{other}/cat/1.jpg", other.lower(), "a photo of a cat."),
        ]
    )
    assert problems == []


@pytest.mark.parametrize(
    ("files", "said"),
    [
        (
            ("seg_train/cat/1.jpg", "seg_test/cat/2.jpg"),
            r"no images in 'seg_test', 'seg_train', but folders\. Are those",
        ),
        (("images/train/cat/1.jpg", "images/test/cat/2.jpg"), r"no images in 'images', but folders\. Are those the"),
        (("Training/cat/1.jpg", "dog/2.jpg"), r"no images in 'Training', but folders"),
    ],
)
def test_a_level_that_is_neither_split_nor_class_is_refused(tmp_path: Path, files: tuple[str, ...], said: str) -> None:
    """Each would be a class otherwise: "a photo of a seg train."."""
    for number, name in enumerate(files):
        save_image(tmp_path / name, number)
    with pytest.raises(UsageError, match=said):
        read("imagefolder", tmp_path)


def test_a_class_may_hold_folders_alone(tmp_path: Path) -> None:
    for number, name in enumerate(("dog/front/1.jpg", "dog/back/2.jpg", "trainer/front/3.jpg")):
        save_image(tmp_path / name, number)
    samples, _ = read("imagefolder", tmp_path)
    assert [sample.captions[0] for sample in samples] == [f"a photo of a {name}." for name in ("dog", "dog", "trainer")]


def test_a_class_called_test_is_a_class(tmp_path: Path) -> None:
    save_image(tmp_path / "test" / "1.jpg")
    save_image(tmp_path / "exam" / "1.jpg")
    samples, _ = read("imagefolder", tmp_path)
    assert [(sample.split, sample.captions[0]) for sample in samples] == [
        ("", "a photo of a exam."),
        ("", "a photo of a test."),
    ]


@pytest.mark.parametrize(
    ("templates", "count", "first"),
    [("photo", 3, "a photo of a cat."), ("simple", 7, "itap of a cat."), ("openai", 80, "a bad photo of a cat.")],
)
def test_shipped_templates(pets: Path, templates: str, count: int, first: str) -> None:
    captions = read("imagefolder", pets, templates=templates)[0][0].captions
    assert (len(captions), captions[0]) == (count, first)


def test_default_templates_are_among_those_of_clip() -> None:
    import open_clip

    openai = {template("{}") for template in open_clip.OPENAI_IMAGENET_TEMPLATES}
    assert openai.issuperset(DEFAULT_TEMPLATES)


def test_templates_and_classes_from_files(pets: Path, tmp_path: Path) -> None:
    templates, classes = tmp_path / "templates.txt", tmp_path / "classes.json"
    templates.write_text("a {} of {braces}.\n\n  {} and {}  \n")
    classes.write_text(json.dumps({"cat": "Katze", "great_dane": "Große Dogge", "unused": "x"}))
    spec = DatasetSpec.parse(f"imagefolder:{pets}?templates={templates}&classes={classes}")
    samples, _ = read("imagefolder", pets, **dict(spec.options))
    assert samples[0].captions == ("a Katze of {braces}.", "Katze and Katze")
    assert samples[3].captions[0] == "a Große Dogge of {braces}."

    classes.write_text('{"cat": "Katze"}')
    with pytest.raises(ValueError, match=r"the class names have none for 'great_dane', of 2 classes; add it"):
        read("imagefolder", pets, classes=str(classes))
    templates.write_text("a photo of a cat\n")
    with pytest.raises(ValueError, match=r"templates\.txt: the template 'a photo of a cat' has no \{\} for the class"):
        read("imagefolder", pets, templates=str(templates))
    templates.write_text("\n")
    with pytest.raises(ValueError, match=r"templates\.txt: no template in it"):
        read("imagefolder", pets, templates=str(templates))
    with pytest.raises(ValueError, match=r"templates='openia' is neither photo, simple nor openai, nor a file"):
        read("imagefolder", pets, templates="openia")


def test_wordnet_folders_want_names(tmp_path: Path) -> None:
    save_image(tmp_path / "n01440764" / "1.jpg")
    with pytest.raises(ValueError, match=r"WordNet ids \(n01440764 \.\.\.\), which make no captions"):
        read("imagefolder", tmp_path)
    samples, problems = read("imagefolder", tmp_path, classes="imagenet")
    assert ([sample.captions[0] for sample in samples], problems) == (["a photo of a tench."], [])
    save_image(tmp_path / "n00000001" / "1.jpg")
    with pytest.raises(ValueError, match=r"'n00000001' are none of ImageNet's 1,000 WordNet ids"):
        read("imagefolder", tmp_path, classes="imagenet")


def test_what_is_not_in_the_form_is_named(pets: Path) -> None:
    save_image(pets / "loose.jpg")
    (pets / "LICENSE").write_text("")
    (pets / ".cache").mkdir()
    (pets / "cat" / "notes.txt").write_text("")
    (pets / "cat" / ".DS_Store").write_text("")
    (pets / "empty").mkdir()
    (pets / "cat" / "gone.jpg").symlink_to(pets / "nowhere.jpg")
    found = load(f"imagefolder:{pets}")
    assert len(found.samples) == 4
    assert told(found.problems) == [
        ("bad-record", "loose.jpg", True),
        ("bad-record", "cat/notes.txt", False),
        ("bad-record", "empty", False),
        ("missing-file", "cat/gone.jpg", True),
    ]


def test_classes_are_said_and_folders_of_classes_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("boy", "bad/dog", "bad/man"):
        save_image(tmp_path / name / "a.jpg")
    for _ in range(2):
        check_dataset(f"imagefolder:{tmp_path}")
    assert capsys.readouterr().err.splitlines() == [
        f"{tmp_path}: the classes are bad, boy",
        f"{tmp_path}/bad: its pictures lie in dog, man, which count as one class. Are those the classes?",
    ]


@pytest.mark.real_data
def test_the_real_cifar10() -> None:
    samples, problems = read("imagefolder", shared("cifar10"))
    assert problems == []
    assert Counter(sample.uri.split("/")[0] for sample in samples) == dict.fromkeys(
        ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"), 100
    )
    assert samples[0] == Sample(
        "airplane/0001.jpg",
        "airplane/0001.jpg",
        "",
        ("a photo of a airplane.", "a photo of the airplane.", "a good photo of a airplane."),
    )
