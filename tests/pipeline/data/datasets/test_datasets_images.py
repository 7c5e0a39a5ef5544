"""Folders of pictures without classes, with captions in .txt files beside them."""

from __future__ import annotations

from pathlib import Path

import pytest

from teacher_cache.pipeline.data.datasets.records import Sample
from teacher_cache.storage.errors import UsageError
from tests.pipeline.data.dataset_files import load, read, save_image, told


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    for number, name in enumerate(("b.jpg", "a.PNG", "more/deep/c.webp", "Test/d.jpg", ".hidden/x.jpg", ".e.jpg")):
        save_image(tmp_path / name, number)
    (tmp_path / "b.txt").write_text("\ufeffOne line.\nAnother.\n")
    return tmp_path


def test_pictures_below_a_folder_in_order(pictures: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert read("images", pictures) == (
        [
            Sample("a.PNG", "a.PNG", "", ()),
            Sample("b.jpg", "b.jpg", "", ("One line.\nAnother.",)),
            Sample("Test/d.jpg", "Test/d.jpg", "test", ()),
            Sample("more/deep/c.webp", "more/deep/c.webp", "", ()),
        ],
        [],
    )
    assert "1 text of several lines, read as one caption each; ?txt=lines splits" in capsys.readouterr().err
    assert read("images", pictures, txt="lines")[0][1].captions == ("One line.", "Another.")
    assert [sample.sample_id for sample in read("images", pictures, uncaptioned="drop")[0]] == ["b.jpg"]
    assert len(load(f"images:{pictures}").samples) == 4


def test_what_is_no_picture_is_named(pictures: Path) -> None:
    (pictures / "notes.txt").write_text("Of nothing.")
    (pictures / "photo.heic").touch()
    (pictures / "a.txt").write_text(" \n")
    samples, problems = read("images", pictures)
    assert samples[0].captions == ()
    assert told(problems) == [
        ("empty-caption", "a.PNG", False),
        ("bad-record", "notes.txt", False),
        ("bad-record", "photo.heic", False),
    ]
    assert problems[2].detail.startswith("no image by its ending, nor the caption of one; images are .jpg, .jpeg, .png")


@pytest.mark.parametrize("file", ["captions/c.txt", "more/deep/c.caption", "more/deep/c.json"])
def test_a_file_that_could_be_a_caption_counts_as_a_lost_one(pictures: Path, file: str) -> None:
    (pictures / file).parent.mkdir(exist_ok=True)
    (pictures / file).write_text("A.")
    (pictures / "b.json").write_text("{}")  # of a picture that has its caption
    problems = read("images", pictures)[1]
    assert {problem.where: problem.lost_captions for problem in problems} == {"b.json": 0, file: 1}
    lost = next(problem for problem in problems if problem.lost_captions)
    assert lost.detail == "not read: the caption belongs in more/deep/c.txt, or in a CSV (path,caption)"


def test_captions_in_another_encoding(pictures: Path) -> None:
    (pictures / "b.txt").write_bytes(b"Ein Caf\xe9.")
    with pytest.raises(UsageError, match=r"b\.txt: not UTF-8 at '.*'\. Save it as UTF-8, or name its encoding"):
        read("images", pictures)
    assert read("images", pictures, encoding="cp1252")[0][1].captions == ("Ein Café.",)
