"""``sample`` and ``neighbours``: the right rows with the right names, ids and captions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from teacher_cache.pipeline.cli.app import app
from teacher_cache.storage.errors import UsageError
from teacher_cache.storage.look.nearest import unit_rows
from teacher_cache.storage.look.rows import CaptionRow, find_neighbours, sample_images
from teacher_cache.storage.read.reader import EmbeddingReader
from tests.conftest import known_row, make_known_cache
from tests.storage.look.test_stats import naive_nearest

run = CliRunner()


def known(tower: str, rows: int) -> Any:
    return unit_rows(np.stack([known_row(tower, row) for row in range(rows)]))


def test_neighbours_of_an_image_are_those_of_the_whole_matrix(known_cache: Path) -> None:
    images, texts = known("image", 10), known("text", 25)
    found = find_neighbours(str(known_cache), image="3", k=4)
    order = [row for row in naive_nearest(images[3:4], images, 10)[0].tolist() if row != 3][:4]
    assert [near.row for near in found.images] == order
    assert [near.cosine for near in found.images] == pytest.approx((images[order] @ images[3]).tolist(), abs=1e-6)
    assert [near.row for near in found.captions] == naive_nearest(images[3:4], texts, 4)[0].tolist()
    assert [near.sample_id for near in found.images] == [f"img-{row}" for row in order]
    assert [near.text for near in found.captions] == [f"img {near.row}" for near in found.captions]
    assert found.image is not None
    assert (found.image.sample_id, found.image.norm, found.caption) == ("img-3", 4.0, None)
    assert (found.images_compared, found.captions_compared) == (10, 25)
    owner = EmbeddingReader(str(known_cache)).captions["image_row"].to_numpy()
    own = np.flatnonzero(owner == 3)
    assert [caption.row for caption in found.image.captions] == own.tolist()
    assert [caption.cosine for caption in found.image.captions] == pytest.approx((texts[own] @ images[3]).tolist())
    assert find_neighbours(str(known_cache), image="img-3", k=4) == found
    assert find_neighbours(str(known_cache), image="id:img-3", k=4) == found


def test_neighbours_of_a_caption(known_cache: Path) -> None:
    images, texts = known("image", 10), known("text", 25)
    found = find_neighbours(str(known_cache), text_row=7, k=30)
    assert found.caption is not None
    assert (found.caption.text, found.caption.sample_id) == ("img 7", "img-2")
    assert [near.row for near in found.images] == naive_nearest(texts[7:8], images, 10)[0].tolist()
    assert [near.row for near in found.captions] == naive_nearest(texts[7:8], texts, 25)[0].tolist()[1:]


def test_a_sample_shows_captions_of_the_image_and_the_nearest_of_all(known_cache: Path) -> None:
    found = sample_images(str(known_cache), count=3, captions=4, seed=1)
    images, texts = known("image", 10), known("text", 25)
    assert len({image.row for image in found.images}) == 3
    for image in found.images:
        nearest = naive_nearest(images[image.row : image.row + 1], texts, 4)[0].tolist()
        assert [caption.row for caption in image.nearest_captions] == nearest
        assert {caption.image_row for caption in image.captions} == {image.row}
    assert sample_images(str(known_cache), count=3, seed=1).images != sample_images(str(known_cache), count=3).images
    of_split = sample_images(str(known_cache), count=50, split="test")
    assert [image.row for image in of_split.images] == [8, 9]


def test_large_galleries_are_drawn_and_counted(tmp_path: Path) -> None:
    path = tmp_path / "large.cache"
    make_known_cache(path, images=100, captions=100)
    found = find_neighbours(str(path), image="3", most=20)
    assert (found.images_compared, found.captions_compared) == (20, 20)
    done = run.invoke(app, ["look", str(path), "--rows", "8", "--nearest", "20", "--json"])
    sample = json.loads(done.stdout)
    own = {caption["row"] for image in sample["images"] for caption in image["captions"]}
    compared = {caption["row"] for image in sample["images"] for caption in image["nearest_captions"]}
    assert own <= compared  # those of the shown images always are, whatever is drawn
    assert len(compared) == sample["captions_compared"]
    assert 8 <= sample["captions_compared"] <= 8 + len(own)


@pytest.mark.parametrize(
    ("image", "row", "said"),
    [
        ("0002", 3, ""),
        ("2", 2, "row 2 is the image 30; id:2 names one by its sample_id\n"),
        ("id:2", 1, ""),
        ("3", 3, "row 3 is the image 0002; id:3 names one by its sample_id\n"),
    ],
)
def test_a_number_is_a_row_and_one_with_leading_zeros_a_sample_id(
    image: str, row: int, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_known_cache(tmp_path / "c", images=4, captions=4, sample_ids=["a", "2", "30", "0002"])
    found = find_neighbours(str(tmp_path / "c"), image=image).image
    assert (found and found.row, capsys.readouterr().err) == (row, said)


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ({}, "name one row to compare with"),
        ({"image": "1", "text_row": 1}, "name one row to compare with"),
        ({"image": "10"}, "no image row 10; rows are 0 to 9. If 10 is a sample_id, write id:10"),
        ({"text_row": 25}, "no text row 25; rows are 0 to 24$"),
        ({"image": "img-77"}, "no image has the sample_id 'img-77'. teacher-cache look shows"),
        ({"image": "1", "view": 1}, "no view 1; views 0 to 0"),
    ],
)
def test_what_is_not_there_is_refused_by_name(known_cache: Path, query: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        find_neighbours(str(known_cache), **query)


def test_a_quarantined_row_has_no_neighbours_and_is_nobodys(tmp_path: Path) -> None:
    path = tmp_path / "q.cache"
    make_known_cache(path, lost=[4])
    with pytest.raises(UsageError, match=r"row 4 \(img-4\) has no embedding in view 0: undecodable: cut short"):
        find_neighbours(str(path), image="4")
    found = find_neighbours(str(path), image="3", k=20)
    assert sorted(near.row for near in found.images) == [0, 1, 2, 5, 6, 7, 8, 9]
    assert found.images_compared == 9


def test_as_people_see_it(known_cache: Path) -> None:
    shown = run.invoke(app, ["look", str(known_cache), "img-3", "--count", "2"]).stdout.splitlines()
    assert shown[0] == "img-3  row 3, train, norm 4.000, img-3.jpg"
    assert "nearest of 10 images:" in shown
    assert len(shown) == shown.index("nearest of 25 captions:") + 3
    shown = run.invoke(app, ["look", str(known_cache), "--count", "1"]).stdout
    assert shown.endswith("nearest among 25 captions; drawn with seed 0\n")
    caption = json.loads(run.invoke(app, ["look", str(known_cache), "--text-row", "0", "--json"]).stdout)
    assert caption["caption"]["text"] == "img 0"


def test_a_caption_cannot_command_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    from teacher_cache.storage.cli.app import print_json, print_lines

    print_lines("red \x1b[31m and\na new line [bold]é")
    assert capsys.readouterr().out == "red \ufffd[31m and\ufffda new line [bold]é\n"
    caption = CaptionRow(row=0, text="\x9b31m\x85\x7f\u2028\u202e\né", image_row=0, sample_id="a", cosine=None)
    print_json(caption)
    printed = capsys.readouterr().out
    assert r'"text": "\u009b31m\u0085\u007f\u2028\u202e\né"' in printed
    assert CaptionRow.model_validate_json(printed) == caption
