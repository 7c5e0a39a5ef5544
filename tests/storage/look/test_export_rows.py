"""``export``: what numpy and pyarrow read from the folder is what the cache holds, pair by pair."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

from teacher_cache.pipeline.cli.app import app
from teacher_cache.storage.errors import UsageError
from teacher_cache.storage.look.export import export_rows
from teacher_cache.storage.read.reader import EmbeddingReader
from tests.conftest import known_row
from tests.storage.look.test_diff import BASE, Picture, make

run = CliRunner()


def test_one_row_per_image_with_its_first_caption(known_cache: Path, tmp_path: Path) -> None:
    done = run.invoke(app, ["export", str(known_cache), "--out", str(tmp_path / "e"), "--json"])
    assert done.exit_code == 0, done.output
    result = json.loads(done.stdout)
    assert result == json.loads((tmp_path / "e/export.json").read_text())
    assert result["manifest_digest"] == EmbeddingReader(str(known_cache)).manifest.digest
    assert (result["rows"], result["images"], result["parts"], result["captions"]) == (10, 10, 1, "first")
    files = {path.relative_to(tmp_path / "e").as_posix() for path in (tmp_path / "e").rglob("*") if path.is_file()}
    assert files == {
        "export.json",
        "img_emb/img_emb_0.npy",
        "text_emb/text_emb_0.npy",
        "metadata/metadata_0.parquet",
    }
    image, text = np.load(tmp_path / "e/img_emb/img_emb_0.npy"), np.load(tmp_path / "e/text_emb/text_emb_0.npy")
    table = pq.read_table(tmp_path / "e/metadata/metadata_0.parquet").to_pylist()
    assert image.dtype == text.dtype == np.float16
    assert (image == np.stack([known_row("image", row) for row in range(10)])).all()
    for row, fields in enumerate(table):
        assert (fields["image_path"], fields["sample_id"]) == (f"/nowhere/img-{row}.jpg", f"img-{row}")
        assert fields["caption"] == f"img {fields['text_row']}"
        assert (text[row] == known_row("text", fields["text_row"])).all()
    owner = EmbeddingReader(str(known_cache)).captions["image_row"].to_numpy()
    assert [fields["text_row"] for fields in table] == [int(np.flatnonzero(owner == row)[0]) for row in range(10)]


def test_all_captions_in_several_files_keep_their_order(known_cache: Path, tmp_path: Path) -> None:
    result = export_rows(str(known_cache), str(tmp_path / "e"), captions="all", rows_per_file=2)
    assert (result.rows, result.parts) == (25, 13)
    names = sorted(path.name for path in (tmp_path / "e/img_emb").iterdir())
    assert (names[0], names[-1]) == ("img_emb_00.npy", "img_emb_12.npy")
    owner = EmbeddingReader(str(known_cache)).captions["image_row"].to_numpy()
    image = np.concatenate([np.load(tmp_path / "e/img_emb" / name) for name in names])
    text = np.concatenate([np.load(path) for path in sorted((tmp_path / "e/text_emb").iterdir())])
    assert (image == np.stack([known_row("image", row) for row in owner])).all()
    assert (text == np.stack([known_row("text", row) for row in range(25)])).all()
    rows = [row for path in sorted((tmp_path / "e/metadata").iterdir()) for row in pq.read_table(path).to_pylist()]
    assert [row["text_row"] for row in rows] == list(range(25))


def test_quarantined_images_are_left_out_and_counted(tmp_path: Path) -> None:
    cache = make(tmp_path / "c", [*BASE[:5], BASE[5]._replace(split="test")], lost=(2, 5))
    result = export_rows(cache, str(tmp_path / "e"))
    assert (result.rows, result.quarantined) == (4, 2)
    ids = pq.read_table(tmp_path / "e/metadata/metadata_0.parquet")["sample_id"].to_pylist()
    assert ids == ["p0", "p1", "p3", "p4"]
    train = export_rows(cache, str(tmp_path / "t"), split="train")
    assert (train.rows, train.quarantined) == (4, 1)
    with pytest.raises(UsageError, match="no image with an embedding to export"):
        export_rows(cache, str(tmp_path / "x"), split="test")


def test_images_without_captions_cannot_be_paired(tmp_path: Path) -> None:
    cache = make(tmp_path / "c", [*BASE[:3], Picture("silent", "s", ())])
    with pytest.raises(
        UsageError, match=r"1 of 4 images have no caption\. To export the images alone add --captions non"
    ):
        export_rows(cache, str(tmp_path / "e"))
    assert not (tmp_path / "e").exists()


@pytest.mark.parametrize("captioned", [True, False])
def test_images_alone(tmp_path: Path, captioned: bool) -> None:
    """Where none has a caption, that is what is exported unasked."""
    pictures = BASE[:3] if captioned else [picture._replace(captions=()) for picture in BASE[:3]]
    cache = make(tmp_path / "c", [*pictures, Picture("silent", "s", ())])
    result = export_rows(cache, str(tmp_path / "e"), captions="none" if captioned else "first")
    assert (result.captions, result.rows, result.images) == ("none", 4, 4)
    assert sorted(path.name for path in (tmp_path / "e").iterdir()) == ["export.json", "img_emb", "metadata"]
    table = pq.read_table(tmp_path / "e/metadata/metadata_0.parquet")
    assert table["sample_id"].to_pylist() == ["p0", "p1", "p2", "silent"]
    assert not {"caption", "text_row"} & set(table.column_names)
    assert len(np.load(tmp_path / "e/img_emb/img_emb_0.npy")) == 4


def test_what_cannot_be_written_is_refused_before_anything_is(known_cache: Path, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full/mine").touch()
    for out in (tmp_path / "full", tmp_path / "full/mine"):
        with pytest.raises(UsageError, match="is there already"):
            export_rows(str(known_cache), str(out))
    with pytest.raises(UsageError, match="an export is written to a local folder"):
        export_rows(str(known_cache), "s3://bucket/e")
    with pytest.raises(UsageError, match="no view 1"):
        export_rows(str(known_cache), str(tmp_path / "v"), view=1)
    assert not (tmp_path / "v").exists()
    done = run.invoke(app, ["export", str(known_cache), "--out", str(tmp_path / "w"), "--captions", "some"])
    assert (done.exit_code, "'some' is not one of 'first', 'all'" in done.stderr) == (2, True)
    shown = run.invoke(app, ["export", str(known_cache), "--out", str(tmp_path / "p")]).stdout
    assert "10 pairs of 10 images, 8 wide, float16, in 1 part; 0 quarantined left out" in shown
    assert "only the first caption of each image: 15 further captions left out; --captions all writes them" in shown


def test_an_export_that_fails_leaves_nothing(
    known_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pq, "write_table", full)
    with pytest.raises(OSError, match="No space"):
        export_rows(str(known_cache), str(tmp_path / "e"))
    assert list(tmp_path.iterdir()) == [known_cache]


def test_rows_are_written_one_part_after_the_other(
    known_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file of its whole size from the start has no room of its own, and a full disk then kills the process."""
    monkeypatch.setattr("teacher_cache.storage.look.export._ROWS_AT_ONCE", 4)
    sizes = []

    def look(stage: str, done: int, total: int) -> None:
        if done <= 10:  # the images come first
            sizes.extend(path.stat().st_size for path in tmp_path.rglob(".partial-*/img_emb/*.npy"))

    export_rows(str(known_cache), str(tmp_path / "e"), progress=look)
    path = tmp_path / "e/img_emb/img_emb_0.npy"
    assert len(sizes) == 3
    assert max(sizes) < path.stat().st_size
    np.save(tmp_path / "by_numpy.npy", np.stack([known_row("image", row) for row in range(10)]))
    assert path.read_bytes() == (tmp_path / "by_numpy.npy").read_bytes()
