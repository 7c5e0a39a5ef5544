"""Karpathy's JSON files of COCO, Flickr30k and Flickr8k."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from teacher_cache.pipeline.data.datasets.records import Sample
from teacher_cache.pipeline.data.datasets.samples import load_samples
from teacher_cache.pipeline.data.datasets.spec import DatasetSpec
from tests.pipeline.data.dataset_files import load, read, save_image, told


def entry(filename: str, split: str, captions: list[str], **more: Any) -> dict[str, Any]:
    sentences = [
        {"raw": raw, "tokens": raw.lower().split(), "imgid": 0, "sentid": number} for number, raw in enumerate(captions)
    ]
    return {"filename": filename, "split": split, "sentences": sentences, "imgid": 0, "sentids": [], **more}


def write(path: Path, images: list[Any], dataset: str = "flickr30k") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"images": images, "dataset": dataset}), encoding="utf-8")
    return path


@pytest.fixture
def flickr30k(tmp_path: Path) -> Path:
    root = tmp_path / "flickr30k"
    images = [
        entry("10.jpg", "train", ["Two men.", "Men, outside."]),
        entry("11.jpg", "test", ["A girl."]),
        entry("12.jpg", "val", ["A dog."]),
    ]
    write(root / "dataset_flickr30k.json", images)
    for number in (10, 11, 12):
        save_image(root / "flickr30k-images" / f"{number}.jpg", number)
    return root


def test_file_order_and_published_splits(flickr30k: Path) -> None:
    expected = [
        Sample("10.jpg", "flickr30k-images/10.jpg", "train", ("Two men.", "Men, outside.")),
        Sample("11.jpg", "flickr30k-images/11.jpg", "test", ("A girl.",)),
        Sample("12.jpg", "flickr30k-images/12.jpg", "val", ("A dog.",)),
    ]
    assert read("karpathy", flickr30k) == (expected, [])
    assert read("karpathy", flickr30k / "dataset_flickr30k.json") == (expected, [])
    found, digests = load_samples(DatasetSpec.parse(f"karpathy:{flickr30k}/dataset_flickr30k.json"))
    assert (found.samples, found.root, len(set(digests))) == (expected, str(flickr30k), 3)


@pytest.mark.parametrize("place", ["", "images/"])
def test_coco_images_lie_below_their_filepath(tmp_path: Path, place: str) -> None:
    train, val = "COCO_train2014_000000000009.jpg", "COCO_val2014_000000391895.jpg"
    images = [
        entry(val, "test", ["A man."], filepath="val2014", cocoid=391895),
        entry(train, "train", ["Boxes."], filepath="train2014", cocoid=9),
        entry("COCO_val2014_000000000042.jpg", "restval", ["Shoes."], filepath="val2014", cocoid=42),
    ]
    write(tmp_path / "dataset_coco.json", images, "coco")
    save_image(tmp_path / place / "val2014" / val)
    save_image(tmp_path / place / "train2014" / train, 1)
    found = load(f"karpathy:{tmp_path}")
    assert found.samples == [
        Sample(f"val2014/{val}", f"{place}val2014/{val}", "test", ("A man.",)),
        Sample(f"train2014/{train}", f"{place}train2014/{train}", "train", ("Boxes.",)),
    ]
    assert told(found.problems) == [("missing-file", "val2014/COCO_val2014_000000000042.jpg", True)]


@pytest.mark.parametrize("place", ["images", "Flicker8k_Dataset", "."])
def test_images_are_found_where_they_are(tmp_path: Path, place: str) -> None:
    write(tmp_path / "dataset_flickr8k.json", [entry("a.jpg", "train", ["A."])])
    save_image(tmp_path / place / "a.jpg")
    (samples, problems) = read("karpathy", tmp_path)
    assert problems == []
    assert [sample.uri for sample in samples] == ["a.jpg" if place == "." else f"{place}/a.jpg"]


def test_images_option_names_a_folder_elsewhere(flickr30k: Path, tmp_path: Path) -> None:
    (flickr30k / "flickr30k-images").rename(tmp_path / "photos")
    samples, _ = read("karpathy", flickr30k, images=str(tmp_path / "photos"))
    assert samples[0].uri == f"{tmp_path}/photos/10.jpg"


def test_each_thing_wrong_is_named_and_the_rest_is_read(flickr30k: Path) -> None:
    images: list[Any] = [
        {"split": "train", "sentences": []},
        7,
        entry("../11.jpg", "train", ["Outside."]),
        entry("11.jpg", "train", ["Outside too."], filepath="../.."),
        entry("10.jpg", "train", ["", "Two men."]),
        entry("11.jpg", "train", []),
        {**entry("12.jpg", "val", ["A dog."]), "split": None},
    ]
    images[6]["sentences"].append({"tokens": ["a", "cat"]})
    write(flickr30k / "dataset_flickr30k.json", images)
    samples, problems = read("karpathy", flickr30k)
    assert [(sample.sample_id, sample.split, sample.captions) for sample in samples] == [
        ("10.jpg", "train", ("Two men.",)),
        ("12.jpg", "", ("A dog.",)),
    ]
    name = "dataset_flickr30k.json"
    assert told(problems) == [
        ("bad-record", f"{name} images[0]", True),
        ("bad-record", f"{name} images[1]", True),
        ("bad-record", f"{name} images[2]", True),
        ("bad-record", f"{name} images[3]", True),
        ("empty-caption", "10.jpg", False),
        ("no-caption", "11.jpg", True),
        ("bad-record", f"{name} images[6]", False),
        ("bad-record", f"{name} images[6]", False),
    ]
    assert [problem.detail for problem in problems[-2:]] == [
        "sentence 1 of 12.jpg has no raw text",
        "12.jpg has no split; it is kept with none",
    ]


def test_several_files_ask_for_one(flickr30k: Path) -> None:
    write(flickr30k / "dataset_flickr8k.json", [])
    with pytest.raises(ValueError, match=r"holds dataset_flickr30k\.json, dataset_flickr8k\.json; name one"):
        read("karpathy", flickr30k)
