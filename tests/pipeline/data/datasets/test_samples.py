"""Specs, image bytes, and the one place that decides which images get a row."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from teacher_cache.pipeline.data.datasets.adapters import adapter
from teacher_cache.pipeline.data.datasets.files import data_folder, uri_below
from teacher_cache.pipeline.data.datasets.records import Sample
from teacher_cache.pipeline.data.datasets.samples import ImageSource, load_samples
from teacher_cache.pipeline.data.datasets.spec import DatasetSpec
from tests.pipeline.data.dataset_files import load, save_image, told


@pytest.mark.parametrize(
    ("text", "spec"),
    [
        ("flickr:/data/flickr8k", DatasetSpec("flickr", "/data/flickr8k")),
        ("table:p.csv?caption=title&id=", DatasetSpec("table", "p.csv", (("caption", "title"), ("id", "")))),
        ("table:s3://b/p.csv?path=url", DatasetSpec("table", "s3://b/p.csv", (("path", "url"),))),
        ("imagefolder:/what?/here", DatasetSpec("imagefolder", "/what?/here")),
        (
            "webdataset:{a,b}/{00..03}.tar?split=my%20own",
            DatasetSpec("webdataset", "{a,b}/{00..03}.tar", (("split", "my own"),)),
        ),
        ("images:p?holdout=10%&txt=lines", DatasetSpec("images", "p", (("holdout", "10%"), ("txt", "lines")))),
        ("table:p.csv?caption=a%2541%", DatasetSpec("table", "p.csv", (("caption", "a%41%"),))),
        ("table:p.csv?caption=a%26b%2Bc", DatasetSpec("table", "p.csv", (("caption", "a&b+c"),))),
    ],
)
def test_spec_reads_and_writes_the_same_text(text: str, spec: DatasetSpec) -> None:
    assert DatasetSpec.parse(text) == spec
    assert str(spec) == text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("/data/flickr8k", r"/data/flickr8k: /data is not there; / holds "),
        (
            "flicker:/data",
            r"dataset kind 'flicker' is not known\. Did you mean flickr\? Write KIND:PATH with one of coco, karp",
        ),
        ("coco:", r"'coco:' has no path; write coco:PATH"),
        ("coco:x?splits=a&splits=b", r"gives a setting twice; it has splits, splits"),
    ],
)
def test_spec_that_cannot_be_read(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DatasetSpec.parse(text)


@pytest.mark.parametrize(
    ("kind", "known"),
    [
        ("coco", "splits, images"),
        ("karpathy", "images"),
        ("flickr", "captions, images"),
        ("webdataset", "split, txt, ids, encoding, caption, syn"),
        ("imagefolder", "templates, classes, split"),
        ("images", "txt, encoding"),
        ("table", "path, caption, split, id, encoding, kind"),
        ("scenes", "seed, train, dev, test"),
    ],
)
def test_an_unknown_option_lists_the_known_ones(kind: str, known: str, tmp_path: Path) -> None:
    shared = "holdout, uncaptioned, sample, part"
    with pytest.raises(ValueError, match=rf"dataset kind '{kind}' has no option 'colour'; it has {known}, {shared}$"):
        adapter(kind)(str(tmp_path), colour="red")


def test_images_are_digested_in_the_adapters_order(tmp_path: Path) -> None:
    contents = [save_image(tmp_path / f"{number}.png", 9 * number) for number in range(20)]
    rows = [f"{number}.png,Picture {number}." for number in reversed(range(20))]
    (tmp_path / "t.csv").write_text("path,caption\n" + "\n".join(rows))
    calls: list[tuple[int, int]] = []
    found, digests = load_samples(DatasetSpec.parse(f"table:{tmp_path}/t.csv"), lambda *call: calls.append(call))
    assert [sample.uri for sample in found.samples] == [f"{number}.png" for number in reversed(range(20))]
    assert digests == [hashlib.sha256(content).hexdigest() for content in reversed(contents)]
    assert (found.kind, found.root, found.num_captions, calls) == ("table", str(tmp_path), 20, [(20, 20)])


def test_lost_images_and_rows_add_up_to_the_listed_ones(tmp_path: Path) -> None:
    save_image(tmp_path / "a.jpg")
    save_image(tmp_path / "b.jpg", 1)
    (tmp_path / "folder.jpg").mkdir()
    (tmp_path / "t.csv").write_text(
        f"id,path,caption\n1,a.jpg,A.\n1,b.jpg,Takes a's id.\n1,./a.jpg,B.\n2,gone.jpg,C.\n3,folder.jpg,D.\n"
        f"4,{'long' * 99}.jpg,E.\n5,nul\0.jpg,F.\n"
    )
    found = load(f"table:{tmp_path}/t.csv")
    assert [sample.sample_id for sample in found.samples] == ["1"]
    assert told(found.problems) == [
        ("duplicate-id", "1", True),
        ("duplicate-id", "1", True),
        ("bad-record", "5", True),
        ("missing-file", "2", True),
        ("unreadable-file", "3", True),
        ("unreadable-file", "4", True),
    ]
    assert len(found.samples) + sum(problem.lost_image for problem in found.problems) == 7


def test_a_second_listing_of_the_same_image_loses_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_image(tmp_path / "a.jpg")

    def twice(root: str) -> list[Sample]:
        return [Sample("a", "a.jpg", "", ("A.",)), Sample("a", "a.jpg", "", ("B.",))]

    monkeypatch.setattr("teacher_cache.pipeline.data.datasets.adapters.imagefolder.read", twice)
    found, _ = load_samples(DatasetSpec("imagefolder", str(tmp_path)))
    assert told(found.problems) == [("duplicate-id", "a", False)]


def test_image_source_reads_a_part_or_says_how_much_is_there(tmp_path: Path) -> None:
    (tmp_path / "x.bin").write_bytes(bytes(range(100)))
    source = ImageSource(str(tmp_path))
    for uri in ("x.bin", str(tmp_path / "x.bin"), f"file://{tmp_path}/x.bin"):
        assert source.read(uri) == bytes(range(100))
        assert source.read(uri, 10, 5) == bytes(range(10, 15))
        assert source.read(uri, 0, 3) == bytes(range(3))
        with pytest.raises(OSError, match=r"x\.bin: 10 bytes at offset 90, 11 wanted; the file is cut short"):
            source.read(uri, 90, 11)
    with pytest.raises(FileNotFoundError):
        source.read("y.bin")


def test_image_source_below_a_url() -> None:
    import fsspec

    fsspec.filesystem("memory").pipe("/images-test/a.jpg", b"0123456789")
    source = ImageSource("memory://images-test/")
    assert source.resolve("a.jpg") == "memory://images-test/a.jpg"
    assert (source.read("a.jpg"), source.read("a.jpg", 2, 3)) == (b"0123456789", b"234")
    with pytest.raises(FileNotFoundError):
        source.read("b.jpg")
    with pytest.raises(OSError, match=r"nosuch://x/a\.jpg: ValueError: Protocol not known: nosuch"):
        source.read("nosuch://x/a.jpg")


@pytest.mark.parametrize(
    ("folder", "name", "uri"),
    [
        ("images", "a.jpg", "images/a.jpg"),
        (".", "a.jpg", "a.jpg"),
        ("images", "b/../a.jpg", "images/b/../a.jpg"),
        ("images", "..jpg", "images/..jpg"),
        ("images", "../a.jpg", None),
        ("images", "b/../../a.jpg", None),
        ("images", "..", None),
        ("images", "/a.jpg", None),
        ("images", "s3://bucket/a.jpg", None),
        ("images", "", None),
    ],
)
def test_names_from_a_dataset_file_stay_in_their_folder(folder: str, name: str, uri: str | None) -> None:
    assert uri_below(folder, name) == uri


@pytest.mark.parametrize(
    ("root", "folder"),
    [
        ("s3://bucket/coco", "s3://bucket/coco"),
        ("s3://bucket/coco/pairs.parquet", "s3://bucket/coco"),
        ("https://host/x/pairs.csv?token=1.2", "https://host/x"),
        ("s3://bucket/wds/{000..003}.tar", "s3://bucket/wds"),
        ("/nowhere/wds/train-{000..003}.tar", "/nowhere/wds"),
        ("/nowhere/scenes", "/nowhere/scenes"),
    ],
)
def test_relative_uris_start_from_the_folder(root: str, folder: str) -> None:
    assert data_folder(root) == folder
