"""Several caches read as one: row for row what one cache of all their rows gives."""

from __future__ import annotations

import pickle
import re
import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from teacher_cache.storage.errors import CacheMismatchError, CacheNotFoundError, UsageError
from teacher_cache.storage.format.commits import ChunkRef
from teacher_cache.storage.read.reader import EmbeddingReader
from teacher_cache.storage.read.several.parts import part_locations
from tests.conftest import cache_digest, finish_known_cache, known_row, plan_known_cache

# part-3 has one row, and no part but the last fills its last chunk
STARTS = (0, 7, 17, 18, 30)
VIEWS, CHUNK = 2, 4
LOST = (5, 17, 29)


def make(location: Path | str, first: int, stop: int, **plan: Any) -> None:
    """A cache of rows ``first`` to ``stop`` of the whole, with two captions an image."""
    names = [f"img-{row}" for row in range(first, stop)]
    captions = 2 * (stop - first)
    plan_known_cache(
        location, images=stop - first, captions=captions, chunk_rows=CHUNK, views=VIEWS, sample_ids=names, **plan
    )

    def change(ref: ChunkRef, arrays: dict[str, np.ndarray[Any, Any]]) -> None:
        begin = first if ref.tower == "image" else 2 * first
        rows = range(begin + ref.chunk * CHUNK, begin + ref.chunk * CHUNK + len(arrays["norm"]))
        arrays["embedding"] = np.stack([known_row(ref.tower, row + 1000 * ref.view) for row in rows])
        arrays["norm"] = np.array(rows, np.float32) + 1

    finish_known_cache(location, lost=[row - first for row in LOST if first <= row < stop], change=change)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``whole.cache`` and the same rows in four parts; one more part in int8."""
    home = tmp_path_factory.mktemp("home")
    make(home / "whole.cache", STARTS[0], STARTS[-1])
    for number, (first, stop) in enumerate(pairwise(STARTS)):
        make(home / "parts" / f"part-{number + 8}.cache", first, stop)  # 8, 9, 10, 11
    return home


@pytest.fixture(scope="module")
def whole(home: Path) -> EmbeddingReader:
    return EmbeddingReader(str(home / "whole.cache"))


@pytest.fixture(scope="module")
def parts(home: Path) -> EmbeddingReader:
    return EmbeddingReader(str(home / "parts" / "*.cache"))


def test_parts_are_in_the_order_of_their_numbers(home: Path) -> None:
    names = [Path(name).name for name in part_locations(str(home / "parts" / "part-*.cache"))]
    assert names == ["part-8.cache", "part-9.cache", "part-10.cache", "part-11.cache"]


@given(data=st.data())
def test_rows_are_those_of_the_whole(whole: EmbeddingReader, parts: EmbeddingReader, data: st.DataObject) -> None:
    rows = np.array(data.draw(st.lists(st.sampled_from(whole.image_rows().tolist()), max_size=40)), np.int64)
    views = np.array(data.draw(st.lists(st.integers(0, VIEWS - 1), min_size=len(rows), max_size=len(rows))), np.int64)
    texts = np.array(data.draw(st.lists(st.integers(0, 2 * STARTS[-1] - 1), max_size=40)), np.int64)
    for array in ("embedding", "norm", "view"):
        np.testing.assert_array_equal(parts.take("image", rows, views, array), whole.take("image", rows, views, array))
    np.testing.assert_array_equal(parts.take("text", texts), whole.take("text", texts))
    for table, numbers, columns in (("samples", rows, ["row", "sample_id"]), ("captions", texts, ["row", "image_row"])):
        ours, theirs = (reader.table_rows(table, numbers).select(columns) for reader in (parts, whole))
        assert ours.equals(theirs)


def test_streams_resident_rows_and_counts_are_the_same(whole: EmbeddingReader, parts: EmbeddingReader) -> None:
    rng = np.random.default_rng(0)
    for tower, rows in (("image", whole.image_rows()), ("text", np.arange(2 * STARTS[-1]))):
        views = VIEWS if tower == "image" else 1
        batches = [(rng.choice(rows, 9), rng.integers(0, views, 9)) for _ in range(6)]
        streams = [[*reader.stream(tower, batches, read_ahead_bytes=0)] for reader in (parts, whole)]
        np.testing.assert_array_equal(*streams)
        resident = [reader.resident(tower) for reader in (parts, whole)]
        np.testing.assert_array_equal(*(held.rows for held in resident))
        np.testing.assert_array_equal(*(held.take(*batches[0]) for held in resident))
    assert len(parts) == len(whole)
    assert [row.row for row in parts.quarantined] == [row.row for row in whole.quarantined] == [*LOST]
    np.testing.assert_array_equal(parts.image_rows(), whole.image_rows())
    np.testing.assert_array_equal(parts.image_rows("test"), [6, 15, 16, 28])  # a fifth of each part, but for LOST
    np.testing.assert_array_equal(parts.caption_offsets, whole.caption_offsets)
    np.testing.assert_array_equal(parts.rows_of(["img-29", "img-0", "img-17"]), [29, 0, 17])
    with pytest.raises(IndexError, match="rows are 0 to 29"):
        parts.take("image", np.array([30]))
    with pytest.raises(Exception, match="image row 17 was quarantined"):
        parts.take("image", np.array([3, 17]))


def test_a_pickled_reader_has_the_same_rows(parts: EmbeddingReader) -> None:
    again = pickle.loads(pickle.dumps(parts))
    assert again.manifest.digest == parts.manifest.digest
    np.testing.assert_array_equal(again.take("text", np.arange(60)), parts.take("text", np.arange(60)))


def test_int8_rows_are_those_of_each_part(tmp_path: Path) -> None:
    for number, (first, stop) in enumerate(pairwise(STARTS)):
        make(tmp_path / f"{number}.cache", first, stop, dtype="int8")
    parts, rows = EmbeddingReader(str(tmp_path / "*.cache")), np.array([20, 3, 7, 28])
    expected = [
        EmbeddingReader(str(tmp_path / f"{part}.cache")).take("image", np.array([row - STARTS[part]]), 1)
        for row, part in zip(rows, (3, 0, 1, 3), strict=True)
    ]
    np.testing.assert_array_equal(parts.take("image", rows, 1), np.concatenate(expected))
    np.testing.assert_array_equal(next(parts.stream("image", [(rows, np.ones(4, np.int64))])), np.concatenate(expected))
    np.testing.assert_array_equal(parts.resident("image").take(rows, 1), np.concatenate(expected))


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        ({"dtype": "int8"}, "targets.dtype: .int8. in the cache, .float16. asked for.*It was compared with"),
        ({"compressor": "blosc"}, r"0\.cache and .*1\.cache: compressor is None and blosc"),
    ],
)
def test_parts_of_other_forms_are_refused_by_name(tmp_path: Path, plan: dict[str, Any], message: str) -> None:
    make(tmp_path / "0.cache", 0, 7)
    make(tmp_path / "1.cache", 7, 12, **plan)
    with pytest.raises(CacheMismatchError, match=message):
        EmbeddingReader(str(tmp_path / "*.cache"))


def test_the_same_pictures_twice_and_wrong_patterns_are_refused(tmp_path: Path, home: Path) -> None:
    make(tmp_path / "0.cache", 0, 7)
    make(tmp_path / "1.cache", 0, 7)
    with pytest.raises(CacheMismatchError, match=r"0\.cache and .*1\.cache: both are of the same pictures"):
        EmbeddingReader(str(tmp_path / "*.cache"))
    with pytest.raises(CacheNotFoundError, match="none of the 4 folders in"):
        EmbeddingReader(str(home / "parts" / "*.zarr"))
    with pytest.raises(UsageError, match="not for the folder"):
        EmbeddingReader(str(home / "*" / "part-8.cache"))


def test_the_digest_stands_for_every_part(home: Path, tmp_path: Path, parts: EmbeddingReader) -> None:
    """However the pattern is written: for a part more, less or changed it is another one."""
    before, copies = cache_digest(home / "parts"), tmp_path / "parts"
    shutil.copytree(home / "parts", copies)
    assert EmbeddingReader(f"{copies}/part-*").manifest.digest == parts.manifest.digest
    shutil.rmtree(copies / "part-10.cache")
    fewer = EmbeddingReader(f"{copies}/*.cache")
    make(copies / "part-10.cache", STARTS[2], STARTS[3], name="other")
    changed = EmbeddingReader(f"{copies}/*.cache")
    assert len({reader.manifest.digest for reader in (parts, fewer, changed)}) == 3
    message = re.escape(f"its manifest is {changed.manifest.digest[:12]}") + ".*has other parts"
    with pytest.raises(CacheMismatchError, match=message):
        EmbeddingReader(changed.location, manifest_digest=parts.manifest.digest)
    assert cache_digest(home / "parts") == before


@pytest.mark.parametrize("object_store", ["seaweedfs"], indirect=True)
def test_parts_on_an_object_store(s3_location: str, whole: EmbeddingReader) -> None:
    for number, (first, stop) in enumerate(pairwise(STARTS)):
        make(f"{s3_location}/parts/{number}.cache", first, stop)
    parts = EmbeddingReader(f"{s3_location}/parts/*.cache")
    np.testing.assert_array_equal(parts.take("text", np.arange(60)), whole.take("text", np.arange(60)))
    rows = [np.random.default_rng(0).permutation(whole.image_rows())]
    np.testing.assert_array_equal(*(next(reader.stream("image", rows)) for reader in (parts, whole)))
    assert [row.row for row in parts.quarantined] == [*LOST]
