"""A cache's images by row: of all rows or of some, the same bytes and names."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest

from teacher_cache.pipeline.data.batches.cached_samples import SampleRecord
from teacher_cache.pipeline.data.batches.stored_images import CachedImages, StoredImages
from teacher_cache.pipeline.data.datasets.samples import ImageSource
from teacher_cache.pipeline.report.collect import collect_report
from teacher_cache.storage.read.reader import EmbeddingReader
from tests.storage.look.test_diff import BASE, make


def test_some_rows_are_the_same_images_as_all_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("teacher_cache.storage.format.tables._ROWS_PER_FILE", 5)  # rows of three files
    cache = make(tmp_path / "some", BASE)
    reader = EmbeddingReader(cache)
    asked: list[str] = []

    def read(self: ImageSource, uri: str, offset: int = -1, length: int = -1) -> bytes:
        asked.append(uri)
        return uri.encode()

    monkeypatch.setattr(ImageSource, "read", read)
    # the digest that is wanted is as good a proof of the row as bytes that have it
    proven: list[str] = []
    monkeypatch.setattr(
        "teacher_cache.pipeline.data.batches.stored_images.require_content",
        lambda data, sha256, where: proven.append(sha256),
    )
    rows = [11, 3, 0, 7, 3]
    some = pickle.loads(pickle.dumps(CachedImages(reader, ImageSource("/photos"), rows)))
    whole = CachedImages(reader, ImageSource("/photos"), range(reader.samples.num_rows))
    for row in rows:
        assert some.read(row) == whole.read(row) == reader.samples["uri"][row].as_py().encode()
        assert some.named(row) == whole.named(row)
        assert f"row {row} (p{row}): /photos/" in some.named(row)
    assert proven[::2] == proven[1::2] == reader.samples["content_sha256"].take(rows).to_pylist()
    with pytest.raises(KeyError):
        some.read(4)


def test_names_for_others_hold_no_folder_of_this_machine(tmp_path: Path) -> None:
    reader = EmbeddingReader(make(tmp_path / "named", BASE))
    images = CachedImages(reader, ImageSource("/home/somebody/client"), [2])
    uri = reader.samples["uri"][2].as_py()
    assert images.named(2) == f"row 2 (p2): /home/somebody/client/{uri}"
    assert images.named_within(2) == f"row 2 (p2, {uri})"
    for elsewhere in ("/home/somebody/a.jpg", "s3://client/a.jpg"):
        assert StoredImages(ImageSource("/")).named_within(SampleRecord(2, "p2", elsewhere, -1, -1, "")) == "row 2 (p2)"


def test_a_report_never_holds_the_whole_table_of_samples(known_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def whole(self: EmbeddingReader) -> Any:
        raise AssertionError("all samples were read")

    monkeypatch.setattr(EmbeddingReader, "samples", property(whole))
    with pytest.raises(AssertionError, match="all samples"):
        EmbeddingReader(str(known_cache)).samples  # noqa: B018
    found = collect_report(str(known_cache))
    assert found.row_map is not None
    assert found.notes[-1].startswith("10 of 10 pictures are missing. ")
