"""Tables by range: the rows of the whole table, few of them in memory, and each file opened and proven once."""

from __future__ import annotations

import hashlib
import shutil
import uuid
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from teacher_cache.storage.check.verify import verify_cache
from teacher_cache.storage.errors import CacheCorruptError
from teacher_cache.storage.files.location import open_files
from teacher_cache.storage.format.commits import all_chunks
from teacher_cache.storage.format.manifest import StaticFile
from teacher_cache.storage.format.manifest_file import read_manifest
from teacher_cache.storage.format.table_rows import TableRows
from teacher_cache.storage.format.tables import (
    CAPTIONS,
    ROWS_PER_GROUP,
    SAMPLES,
    SCHEMAS,
    open_static,
    read_table,
    table_files,
)
from teacher_cache.storage.write.writer import EmbeddingWriter
from tests.conftest import known_arrays, plan_known_cache

IMAGES, TEXTS = 61, 155
PER_FILE, PER_GROUP, HELD = 24, 6, 12


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files, row groups and what is kept of them are small: 7 files of captions, 4 groups in each."""
    monkeypatch.setattr("teacher_cache.storage.format.tables._ROWS_PER_FILE", PER_FILE)
    monkeypatch.setattr("teacher_cache.storage.format.tables.ROWS_PER_GROUP", PER_GROUP)
    monkeypatch.setattr("teacher_cache.storage.format.table_rows.HELD_ROWS", HELD)


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each file of a table was opened."""
    found: Counter[str] = Counter()

    def count(files: Any, key: str, wanted: StaticFile) -> pa.NativeFile:
        found[key] += 1
        return open_static(files, key, wanted)

    monkeypatch.setattr("teacher_cache.storage.format.table_rows.open_static", count)
    return found


def planned(location: Path | str) -> tuple[TableRows, pa.Table]:
    """The captions of a new cache: by range, and all of them."""
    plan_known_cache(location, IMAGES, TEXTS)
    files = open_files(location)
    manifest = read_manifest(files)
    return TableRows(files, manifest, CAPTIONS), read_table(files, manifest, CAPTIONS)


@settings(max_examples=30)
@given(
    per_file=st.integers(1, 80),
    per_group=st.integers(1, 80),
    held=st.integers(1, 80),
    asked=st.lists(st.tuples(st.integers(0, TEXTS), st.integers(0, TEXTS)), max_size=12),
)
def test_any_ranges_are_those_of_the_whole_table(
    per_file: int, per_group: int, held: int, asked: list[tuple[int, int]]
) -> None:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("teacher_cache.storage.format.tables._ROWS_PER_FILE", per_file)
        patched.setattr("teacher_cache.storage.format.tables.ROWS_PER_GROUP", per_group)
        patched.setattr("teacher_cache.storage.format.table_rows.HELD_ROWS", held)
        rows, whole = planned(f"memory://{uuid.uuid4()}/x.cache")
        for ends in asked:
            first, stop = sorted(ends)
            found = rows.read(range(first, stop))
            assert found.schema == whole.schema
            assert found.to_pylist() == whole.slice(first, stop - first).to_pylist()
            assert rows.held_rows <= max(held, min(per_group, per_file))
        numbers = np.array([end for ends in asked for end in ends if end < TEXTS], np.int64)
        for taken in (numbers, np.sort(numbers)):
            assert rows.take(taken).to_pylist() == whole.take(pa.array(taken)).to_pylist()
            assert rows.held_rows <= max(held, min(per_group, per_file))


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("where", ["folder", "store"])
def test_in_order_each_file_is_opened_once_and_few_rows_are_held(
    where: str, tmp_path: Path, opened: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where those that write are some chunks behind those that prepare."""
    rows, whole = planned(tmp_path / "c" if where == "folder" else f"memory://{uuid.uuid4()}/x.cache")
    groups: list[int] = []
    read = pq.ParquetFile.read_row_group

    def count(self: pq.ParquetFile, group: int, **settings: Any) -> pa.Table:
        groups.append(group)
        return read(self, group, **settings)

    monkeypatch.setattr(pq.ParquetFile, "read_row_group", count)
    for start in range(0, TEXTS, 2):
        for first in (start, max(start - 4, 0)):
            found = rows.read(range(first, min(first + 2, TEXTS)))
            assert found["text"].to_pylist() == whole["text"].slice(first, 2).to_pylist()
            assert rows.held_rows <= HELD
    assert len(groups) == 6 * 4 + 2
    assert opened == {f"captions/{number:06d}.parquet": 1 for number in range(7)}


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("where", ["folder", "store"])
def test_a_column_comes_one_row_group_at_a_time(where: str, tmp_path: Path) -> None:
    location = str(tmp_path / "c") if where == "folder" else f"memory://{uuid.uuid4()}/x.cache"
    _, whole = planned(location)
    files = open_files(location)
    rows = TableRows(files, read_manifest(files), CAPTIONS, columns=["image_row"])
    parts = list(rows.parts())
    assert [len(part) for part in parts] == 6 * [6, 6, 6, 6] + [6, 5]
    assert [row for part in parts for row in part["image_row"].to_pylist()] == whole["image_row"].to_pylist()
    if where == "folder":
        damaged = tmp_path / "c" / CAPTIONS / "000003.parquet"
        damaged.write_bytes(damaged.read_bytes()[:-1] + b"!")
        seen = rows.parts()
        assert [next(seen).to_pylist() for _ in range(12)] == [part.to_pylist() for part in parts[:12]]
        with pytest.raises(CacheCorruptError, match=r"captions/000003\.parquet"):
            next(seen)


@pytest.mark.usefixtures("small")
def test_a_process_that_encodes_holds_few_rows_and_opens_each_file_once(tmp_path: Path, opened: Counter[str]) -> None:
    plan_known_cache(tmp_path / "c", IMAGES, TEXTS)
    writer = EmbeddingWriter(str(tmp_path / "c"))
    refs = all_chunks(writer.manifest.layout)
    for ref in refs:
        writer.write(ref, known_arrays(writer, ref))
        assert max(writer.samples.held_rows, writer.captions.held_rows) <= HELD
    writer.seal()
    assert opened == {key: 1 for key in writer.manifest.files if key.startswith((SAMPLES, CAPTIONS))}
    assert len(opened) == 3 + 7
    assert verify_cache(str(tmp_path / "c")).ok  # which compares the records with whole tables
    again = EmbeddingWriter(str(tmp_path / "c"))
    assert again.pending() == []
    assert max(again.samples.held_rows, again.captions.held_rows) <= HELD


def test_files_of_one_large_row_group_are_read_one_at_a_time(
    tmp_path: Path, opened: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As earlier versions wrote them."""
    monkeypatch.setattr("teacher_cache.storage.format.tables._ROWS_PER_FILE", PER_FILE)
    monkeypatch.setattr("teacher_cache.storage.format.table_rows.HELD_ROWS", HELD)
    rows, whole = planned(tmp_path / "c")
    for start in range(0, TEXTS, 3):
        found = rows.read(range(start, min(start + 3, TEXTS)))
        assert found.to_pylist() == whole.slice(start, 3).to_pylist()
        assert rows.held_rows <= PER_FILE
    assert opened == {f"captions/{number:06d}.parquet": 1 for number in range(7)}


def test_a_table_of_one_row_group_has_the_bytes_that_it_had() -> None:
    numbers = np.arange(ROWS_PER_GROUP + 1)
    table = pa.table({"row": numbers, "image_row": numbers, "text": pa.array(numbers).cast(pa.string())})
    small = table.slice(0, ROWS_PER_GROUP)
    assert table_files(CAPTIONS, small) == table_files(CAPTIONS, small, one_group=True)
    for one_group, groups in ((False, [ROWS_PER_GROUP, 1]), (True, [ROWS_PER_GROUP + 1])):
        data = table_files(CAPTIONS, table, one_group)["captions/000000.parquet"][0]
        metadata = pq.read_metadata(pa.BufferReader(data))
        assert [metadata.row_group(at).num_rows for at in range(metadata.num_row_groups)] == groups


@pytest.mark.usefixtures("small")
def test_a_damaged_file_is_named_when_its_rows_are_asked_for(tmp_path: Path) -> None:
    rows, whole = planned(tmp_path / "c")
    damaged = tmp_path / "c" / "captions/000002.parquet"
    data = bytearray(damaged.read_bytes())
    data[len(data) // 2] ^= 1
    damaged.write_bytes(data)
    (tmp_path / "c" / "captions/000005.parquet").unlink()
    found, wanted = hashlib.sha256(data).hexdigest()[:12], rows._manifest.files["captions/000002.parquet"].sha256[:12]
    assert rows.read(range(43, 48)).to_pylist() == whole.slice(43, 5).to_pylist()
    for asked in (range(47, 49), range(60, 61)):
        with pytest.raises(CacheCorruptError, match=rf"000002.parquet: sha256 is {found}, the manifest .* {wanted}"):
            rows.read(asked)
    assert rows.read(range(72, 77)).to_pylist() == whole.slice(72, 5).to_pylist()
    with pytest.raises(CacheCorruptError, match=r"000005.parquet: missing. Run teacher-cache repair"):
        rows.read(range(120, 121))


@pytest.mark.usefixtures("small")
def test_what_cannot_be_read_is_not_taken_for_damage(tmp_path: Path) -> None:
    rows, _ = planned(tmp_path / "c")
    shutil.rmtree(tmp_path / "c" / "captions")
    (tmp_path / "c" / "captions").write_bytes(b"")
    with pytest.raises(NotADirectoryError) as caught:
        rows.read(range(1))
    assert caught.value.filename == f"{tmp_path}/c/captions/000000.parquet"


@pytest.mark.usefixtures("small")
def test_what_is_read_later_is_of_the_file_that_was_proven(tmp_path: Path) -> None:
    rows, whole = planned(tmp_path / "c")
    rows.read(range(1))
    other = whole.slice(0, PER_FILE).set_column(2, "text", pa.array(["x"] * PER_FILE))
    (tmp_path / "other").write_bytes(table_files(CAPTIONS, other)["captions/000000.parquet"][0])
    (tmp_path / "other").replace(tmp_path / "c" / "captions/000000.parquet")
    assert rows.read(range(PER_FILE)).to_pylist() == whole.slice(0, PER_FILE).to_pylist()


@pytest.mark.usefixtures("small")
def test_threads_read_the_same_rows(tmp_path: Path) -> None:
    rows, whole = planned(tmp_path / "c")
    starts = np.random.default_rng(0).integers(0, TEXTS - 9, 400).tolist()
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda start: rows.read(range(start, start + 9)), starts))
    for start, table in zip(starts, found, strict=True):
        assert table["text"].to_pylist() == whole["text"].slice(start, 9).to_pylist()
    assert rows.held_rows <= HELD


def test_rows_that_are_not_there_are_refused(tmp_path: Path) -> None:
    rows, _ = planned(tmp_path / "c")
    for asked in (range(-1, 2), range(TEXTS, TEXTS + 1), range(5, 3), range(0, 4, 2)):
        with pytest.raises(IndexError, match=rf"captions: rows are 0 to {TEXTS - 1}, asked for range"):
            rows.read(asked)
    for row in (-1, TEXTS):
        with pytest.raises(IndexError, match=rf"captions: rows are 0 to {TEXTS - 1}, asked for {row}"):
            rows.take(np.array([row]))
    assert rows.read(range(TEXTS, TEXTS)).schema == SCHEMAS[CAPTIONS]
