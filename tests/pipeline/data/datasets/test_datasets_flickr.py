"""Flickr8k and Flickr30k in each of their published forms."""

from __future__ import annotations

from collections import Counter
from hashlib import sha256
from pathlib import Path

import pytest

from teacher_cache.pipeline.data.datasets.records import Sample
from teacher_cache.pipeline.data.datasets.samples import load_samples
from teacher_cache.pipeline.data.datasets.spec import DatasetSpec
from tests.conftest import shared
from tests.pipeline.data.dataset_files import load, read, save_image, told

CAPTIONS = """image,caption
b.jpg,A black dog runs .
b.jpg,"A dog , running , outside ."
a.jpg,"A sign says ""stop"" ."
c.jpg,Nobody listed this one .
d.jpg,A boat .
"""


@pytest.fixture
def flickr8k(tmp_path: Path) -> Path:
    root = tmp_path / "flickr8k"
    for number, name in enumerate("abcd"):
        save_image(root / "images" / f"{name}.jpg", number)
    (root / "captions.txt").write_text(CAPTIONS)
    (root / "train.txt").write_text("d.jpg\nb.jpg\n")
    (root / "dev.txt").write_text("a.jpg\n\n")
    return root


def test_split_lists_give_the_order_and_the_unlisted_come_last(flickr8k: Path) -> None:
    samples, problems = read("flickr", flickr8k)
    assert problems == []
    assert samples == [
        Sample("d.jpg", "images/d.jpg", "train", ("A boat .",)),
        Sample("b.jpg", "images/b.jpg", "train", ("A black dog runs .", "A dog , running , outside .")),
        Sample("a.jpg", "images/a.jpg", "dev", ('A sign says "stop" .',)),
        Sample("c.jpg", "images/c.jpg", "", ("Nobody listed this one .",)),
    ]


def test_without_lists_every_split_is_empty(flickr8k: Path) -> None:
    (flickr8k / "train.txt").unlink()
    (flickr8k / "dev.txt").unlink()
    samples, _ = read("flickr", flickr8k)
    assert [(sample.sample_id, sample.split) for sample in samples] == [
        ("b.jpg", ""),
        ("a.jpg", ""),
        ("c.jpg", ""),
        ("d.jpg", ""),
    ]


@pytest.mark.parametrize("folder", ["", "Flickr8k_text"])
def test_the_original_archive(tmp_path: Path, folder: str) -> None:
    text = tmp_path / folder
    text.mkdir(exist_ok=True)
    (text / "Flickr8k.token.txt").write_text("a.jpg#0\tA child .\na.jpg#1\tA #1 girl\tclimbs .\nb.jpg#0\tA dog .\n")
    (text / "Flickr8k.lemma.token.txt").write_text("a.jpg#0\tchild\n")
    (text / "Flickr_8k.trainImages.txt").write_text("b.jpg\n")
    (text / "Flickr_8k.devImages.txt").write_text("")
    (text / "Flickr_8k.testImages.txt").write_text("a.jpg\n")
    save_image(tmp_path / "Flicker8k_Dataset" / "a.jpg")
    save_image(tmp_path / "Flicker8k_Dataset" / "b.jpg", 1)
    assert read("flickr", tmp_path) == (
        [
            Sample("b.jpg", "Flicker8k_Dataset/b.jpg", "train", ("A dog .",)),
            Sample("a.jpg", "Flicker8k_Dataset/a.jpg", "test", ("A child .", "A #1 girl\tclimbs .")),
        ],
        [],
    )


def test_flickr30k_token_file_and_lists_without_endings(tmp_path: Path) -> None:
    (tmp_path / "results_20130124.token").write_text("1.jpg#0\tTwo men .\n2.jpg#0\tA girl .\n")
    (tmp_path / "train.txt").write_text("2\n")
    (tmp_path / "val.txt").write_text("1\n")
    save_image(tmp_path / "flickr30k-images" / "1.jpg")
    save_image(tmp_path / "flickr30k-images" / "2.jpg", 1)
    samples, problems = read("flickr", tmp_path)
    assert [(sample.sample_id, sample.split) for sample in samples] == [("2.jpg", "train"), ("1.jpg", "val")]
    assert problems == []


def test_flickr30k_results_csv_with_its_one_broken_line(tmp_path: Path) -> None:
    """Line 19,999 of the published file lacks its second bar."""
    lines = [
        "image_name| comment_number| comment",
        "1.jpg| 0| Two men , one | two .",
        '2.jpg| 0| A "quoted" girl .',
        "2.jpg| 4   A dog runs across the grass .",
    ]
    (tmp_path / "results.csv").write_text("\n".join(lines))
    save_image(tmp_path / "flickr30k_images" / "1.jpg")
    save_image(tmp_path / "flickr30k_images" / "2.jpg", 1)
    samples, problems = read("flickr", tmp_path)
    assert [sample.captions for sample in samples] == [("Two men , one | two .",), ('A "quoted" girl .',)]
    assert told(problems) == [("bad-record", "results.csv line 4", False)]
    assert problems[0].detail == "not name|number|caption: '2.jpg| 4   A dog runs across the grass .'"


def test_captions_txt_of_flickr30k_has_a_number_column(flickr8k: Path) -> None:
    (flickr8k / "captions.txt").write_text('image_name,comment_number,comment\nb.jpg,0, Two dogs\nb.jpg,1,"A, b"\n')
    samples, _ = read("flickr", flickr8k)
    assert samples[0].captions == ("Two dogs", "A, b")


def test_each_thing_wrong_is_named_and_the_rest_is_read(flickr8k: Path) -> None:
    (flickr8k / "captions.txt").write_bytes(
        CAPTIONS.encode()
        + b'd.jpg,"never closed\nd.jpg\nd.jpg,A boat, not quoted .\nd.jpg,A caf\xe9 .\nd.jpg,  \n'
        + b"gone.jpg,A caption without its file .\n../a.jpg,Outside .\n"
    )
    (flickr8k / "dev.txt").write_text("a.jpg\nb.jpg\nlisted-only.jpg\n")
    save_image(flickr8k / "images" / "spare.jpg", 9)
    found = load(f"flickr:{flickr8k}")
    captions = {sample.sample_id: sample.captions for sample in found.samples}
    assert list(captions) == ["d.jpg", "b.jpg", "a.jpg", "c.jpg"]
    assert captions["d.jpg"] == ("A boat .", "A boat, not quoted .", "A caf\ufffd .")
    assert told(found.problems) == [
        ("bad-record", "captions.txt line 7", False),
        ("bad-record", "captions.txt line 8", False),
        ("bad-record", "d.jpg", False),
        ("empty-caption", "d.jpg", False),
        ("duplicate-id", "dev.txt line 2", False),
        ("no-caption", "listed-only.jpg", True),
        ("bad-record", "../a.jpg", True),
        ("no-caption", "spare.jpg", True),
        ("missing-file", "gone.jpg", True),
    ]
    assert found.problems[0].detail == "not CSV (unexpected end of data): 'd.jpg,\"never closed'"
    assert found.problems[1].detail == "1 of 2 fields: 'd.jpg'"


def test_windows_line_ends_and_byte_order_marks(flickr8k: Path) -> None:
    wanted = read("flickr", flickr8k)
    for name in ("captions.txt", "train.txt", "dev.txt"):
        text = (flickr8k / name).read_text()
        (flickr8k / name).write_bytes(b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode())
    assert read("flickr", flickr8k) == wanted


def test_several_caption_files_ask_for_one(flickr8k: Path) -> None:
    (flickr8k / "results.csv").write_text("image_name| comment_number| comment\na.jpg| 0| From the other file .\n")
    with pytest.raises(ValueError, match=r"several files of captions \(captions\.txt, results\.csv\); choose with"):
        read("flickr", flickr8k)
    samples, _ = read("flickr", flickr8k, captions="results.csv")
    assert [sample.captions for sample in samples] == [("From the other file .",)]


def test_images_option_names_another_folder(flickr8k: Path, tmp_path: Path) -> None:
    (flickr8k / "images").rename(tmp_path / "photos")
    samples, _ = read("flickr", flickr8k, images=str(tmp_path / "photos"))
    assert samples[0].uri == f"{tmp_path}/photos/d.jpg"


@pytest.mark.real_data
def test_the_real_flickr8k() -> None:
    found, digests = load_samples(DatasetSpec.parse(f"flickr:{shared('flickr8k')}"))
    samples = found.samples
    assert (found.num_captions, found.problems) == (35000, [])
    assert Counter(sample.split for sample in samples) == {"train": 6000, "dev": 1000}
    assert digests[0] == sha256((shared("flickr8k") / samples[0].uri).read_bytes()).hexdigest()
    assert samples[0].sample_id == "2513260012_03d33305cf.jpg"
    assert samples[0].captions[0] == "A black dog is running after a white dog in the snow ."
