"""COCO as published: annotations beside the image folders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from teacher_cache.pipeline.data.datasets.records import Sample
from teacher_cache.pipeline.data.datasets.samples import load_samples
from teacher_cache.pipeline.data.datasets.spec import DatasetSpec
from tests.pipeline.data.dataset_files import load, read, save_image, told


def write_captions(root: Path, split: str, images: list[Any], annotations: list[Any]) -> None:
    path = root / "annotations" / f"captions_{split}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"info": {}, "licenses": [], "images": images, "annotations": annotations}
    path.write_text(json.dumps(content), encoding="utf-8")


def image(number: int) -> dict[str, Any]:
    return {"id": number, "file_name": f"{number:012d}.jpg", "height": 8, "width": 12, "license": 3}


def note(number: int, image_id: int, caption: str) -> dict[str, Any]:
    return {"id": number, "image_id": image_id, "caption": caption}


@pytest.fixture
def coco(tmp_path: Path) -> Path:
    """Two training images, whose captions come interleaved, and one for validation."""
    root = tmp_path / "coco"
    captions = [note(48, 9, "A bowl.\n"), note(50, 25, "A giraffe."), note(49, 9, "Food in boxes.")]
    write_captions(root, "train2017", [image(25), image(9)], captions)
    write_captions(root, "val2017", [image(139)], [note(7, 139, "A room.")])
    (root / "annotations" / "instances_val2017.json").write_text("not even JSON")
    for split, number in (("train2017", 25), ("train2017", 9), ("val2017", 139)):
        save_image(root / split / f"{number:012d}.jpg", number)
    return root


def test_images_in_file_order_and_captions_in_annotation_order(coco: Path) -> None:
    samples, problems = read("coco", coco)
    assert problems == []
    assert samples == [
        Sample("train2017/000000000025.jpg", "train2017/000000000025.jpg", "train2017", ("A giraffe.",)),
        Sample("train2017/000000000009.jpg", "train2017/000000000009.jpg", "train2017", ("A bowl.", "Food in boxes.")),
        Sample("val2017/000000000139.jpg", "val2017/000000000139.jpg", "val2017", ("A room.",)),
    ]
    found, digests = load_samples(DatasetSpec.parse(f"coco:{coco}"))
    assert (found.samples, len(set(digests))) == (samples, 3)


@pytest.mark.parametrize("place", ["images/{split}", "images"])
def test_images_may_lie_in_an_images_folder(coco: Path, place: str) -> None:
    for split in ("train2017", "val2017"):
        target = coco / place.format(split=split)
        target.mkdir(parents=True, exist_ok=True)
        for path in (coco / split).iterdir():
            path.rename(target / path.name)
        (coco / split).rmdir()
    samples, problems = read("coco", coco)
    assert problems == []
    assert [(coco / sample.uri).is_file() for sample in samples] == [True] * 3
    assert samples[2].sample_id == "val2017/000000000139.jpg"  # whatever the folder


def test_images_option_names_a_folder_elsewhere(coco: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (coco / "val2017").rename(elsewhere / "val2017")
    samples, _ = read("coco", coco, images=str(elsewhere), splits="val2017")
    assert [sample.uri for sample in samples] == [f"{elsewhere}/val2017/000000000139.jpg"]


def test_splits_option_reads_only_those(coco: Path) -> None:
    assert [sample.split for sample in read("coco", coco, splits="val2017")[0]] == ["val2017"]
    with pytest.raises(ValueError, match=r"no captions_test2017\.json; there are splits train2017, val2017"):
        read("coco", coco, splits="test2017")


def test_a_split_that_was_not_downloaded_is_missing_files(coco: Path) -> None:
    (coco / "val2017" / "000000000139.jpg").unlink()
    (coco / "val2017").rmdir()
    found = load(f"coco:{coco}")
    assert len(found.samples) == 2
    assert told(found.problems) == [("missing-file", "val2017/000000000139.jpg", True)]
    assert found.problems[0].detail == f"{coco}/val2017/000000000139.jpg does not exist"


def test_captions_that_are_not_utf8_stay_with_a_mark(coco: Path) -> None:
    path = coco / "annotations" / "captions_val2017.json"
    path.write_bytes(path.read_bytes().replace(b"A room.", b"A caf\xe9."))
    samples, problems = read("coco", coco, splits="val2017")
    assert samples[0].captions == ("A caf\ufffd.",)
    assert told(problems) == [("bad-record", "val2017/000000000139.jpg", False)]
    assert problems[0].detail == "caption 0 is not UTF-8; 1 byte(s) became U+FFFD"
