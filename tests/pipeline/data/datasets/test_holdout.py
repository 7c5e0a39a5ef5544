"""Settings of every kind: ``holdout``, which makes splits where there are none, ``sample`` and ``uncaptioned``."""

from __future__ import annotations

import json
from math import sqrt
from pathlib import Path

import pytest

from teacher_cache.pipeline.data.datasets.adapters import ADAPTERS
from teacher_cache.pipeline.data.datasets.records import Sample
from teacher_cache.storage.errors import UsageError
from tests.pipeline.data.dataset_files import read, save_image, write_tar


def table(path: Path, count: int) -> Path:
    path.write_text("path,caption\n" + "".join(f"{number:05d}.png,A.\n" for number in range(count)))
    return path


def splits(samples: list[Sample]) -> dict[str, str]:
    return {sample.sample_id: sample.split for sample in samples}


@pytest.mark.parametrize(("holdout", "share"), [("10%", 0.1), ("0.5", 0.5), ("2.5%", 0.025)])
def test_the_share_is_within_four_deviations(holdout: str, share: float, tmp_path: Path) -> None:
    count = 20_000
    samples, _ = read("table", table(tmp_path / "t.csv", count), holdout=holdout)
    held = list(splits(samples).values()).count("test")
    assert abs(held - count * share) < 4 * sqrt(count * share * (1 - share))
    assert set(splits(samples).values()) == {"train", "test"}


def test_a_split_is_drawn_by_the_id_alone(tmp_path: Path) -> None:
    """Growth, another order, another place and a second run move no image; a larger share only adds to the test."""
    first = splits(read("table", table(tmp_path / "a.csv", 300), holdout="10%")[0])
    header, *rows = table(tmp_path / "b.csv", 600).read_text().splitlines()
    (tmp_path / "b.csv").write_text("\n".join([header, *reversed(rows)]))
    grown = splits(read("table", tmp_path / "b.csv", holdout="10%")[0])
    assert {name: grown[name] for name in first} == first
    wider = splits(read("table", tmp_path / "a.csv", holdout="0.3")[0])
    assert {name for name in first if first[name] == "test"} < {name for name in wider if wider[name] == "test"}
    # sha256sum of these names begins with 2634c9a6 and 11d8883c; 10 % end at 19999999
    assert (first["00032.png"], first["00033.png"]) == ("train", "test")


def test_a_sample_is_drawn_by_the_id_alone_and_independently_of_the_holdout(tmp_path: Path) -> None:
    path = table(tmp_path / "t.csv", 20_000)
    whole = splits(read("table", path, holdout="10%")[0])
    sample = splits(read("table", path, holdout="10%", sample="5%")[0])
    assert sample == {name: whole[name] for name in sample}
    for chosen, share, of in (
        (sample, 0.05, len(whole)),
        ([n for n in sample if sample[n] == "test"], 0.1, len(sample)),
    ):
        assert abs(len(chosen) - of * share) < 4 * sqrt(of * share * (1 - share))
    wider = splits(read("table", path, sample="0.1")[0])
    assert sample.keys() < wider.keys()
    header, *rows = path.read_text().splitlines()
    path.write_text("\n".join([header, *reversed(rows[:15_000])]))
    assert splits(read("table", path, holdout="10%", sample="5%")[0]) == {n: sample[n] for n in sample if n < "15000"}


def test_a_sample_has_its_share_of_the_problems(tmp_path: Path) -> None:
    lines = [f"{number:05d}.png," for number in range(4_000)]
    (tmp_path / "t.csv").write_text("\n".join(["path,caption", *lines, "a.png,A."]))
    _, problems = read("table", tmp_path / "t.csv", sample="5%")
    assert abs(len({problem.where for problem in problems}) - 200) < 4 * sqrt(190)


def dataset(kind: str, root: Path) -> tuple[Path, dict[str, str]]:
    """Thirty pictures without a split, and one without a caption, in each form; and its settings."""
    names = [f"{number:02d}" for number in range(30)]
    captions = {f"{name}.png": "A." for name in names}
    if kind == "table":
        lines = [f"images/{name},{caption}" for name, caption in {**captions, "x.png": ""}.items()]
        (root / "t.csv").write_text("\n".join(["path,caption", *lines]))
        return root / "t.csv", {}
    if kind == "webdataset":
        members = [(f"{name}.{ending}", "A.") for name in names for ending in ("png", "txt")]
        return write_tar(root / "x.tar", [*members, ("x.png", "")]), {}
    if kind in ("imagefolder", "labelled", "images"):
        for name in names:
            save_image(root / ("cat" if name < "15" else "dog") / f"{name}.png")
        return root, {}
    for name in (*names, "x"):
        save_image(root / "images" / f"{name}.png")
    if kind == "flickr":
        (root / "captions.txt").write_text("image,caption\n" + "".join(f"{name},A.\n" for name in captions))
    elif kind == "karpathy":
        images = [{"filename": name, "split": "", "sentences": [{"raw": "A."}]} for name in captions]
        images.append({"filename": "x.png", "split": "", "sentences": []})
        (root / "dataset_x.json").write_text(json.dumps({"images": images}))
    return root, {}


@pytest.mark.parametrize("kind", [kind for kind in ADAPTERS if kind not in ("coco", "scenes")])
def test_every_kind_holds_images_out(kind: str, tmp_path: Path) -> None:
    root, settings = dataset(kind, tmp_path)
    plain, problems = read(kind, root, **settings)
    held, same = read(kind, root, holdout="30%", **settings)
    assert {sample.split for sample in plain} == {""}
    assert {sample.split for sample in held} == {"train", "test"}
    assert [(one.sample_id, one.uri, one.captions) for one in held] == [
        (one.sample_id, one.uri, one.captions) for one in plain
    ]
    assert problems == same


@pytest.mark.parametrize("kind", ["table", "webdataset", "flickr", "karpathy"])
def test_images_without_captions_are_kept_where_asked(kind: str, tmp_path: Path) -> None:
    root, settings = dataset(kind, tmp_path)
    plain, problems = read(kind, root, **settings)
    kept, others = read(kind, root, uncaptioned="keep", **settings)
    assert (len(plain), len(kept)) == (30, 31)
    assert [sample.captions for sample in kept if sample not in plain] == [()]
    assert [problem for problem in problems if problem.kind != "no-caption"] == others
    assert [problem.lost_image for problem in problems if problem.kind == "no-caption"] == [True]


@pytest.mark.parametrize("kind", ["coco", "scenes"])
def test_a_dataset_with_splits_has_none_drawn(kind: str, tmp_path: Path) -> None:
    settings = {"train": "1", "dev": "1", "test": "1", "seed": "1"} if kind == "scenes" else {}
    if kind == "coco":
        save_image(tmp_path / "val" / "a.png")
        (tmp_path / "annotations").mkdir()
        table = {"images": [{"id": 1, "file_name": "a.png"}], "annotations": [{"image_id": 1, "caption": "A."}]}
        (tmp_path / "annotations" / "captions_val.json").write_text(json.dumps(table))
    split = "val" if kind == "coco" else "train"
    said = rf"{kind}:.*: holdout is for datasets without splits, and .* is in the split '{split}'; leave holdout"
    with pytest.raises(UsageError, match=said):
        read(kind, tmp_path, holdout="10%", **settings)
