"""A reader gives the committed rows or an error: never NaN, never another row's data."""

from __future__ import annotations

import errno
import os
import pickle
import shutil
import uuid
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from teacher_cache.storage.check.verify import verify_cache
from teacher_cache.storage.errors import (
    CacheCorruptError,
    CacheIncompleteError,
    CacheMismatchError,
    CacheUnreachableError,
    UsageError,
)
from teacher_cache.storage.files.local import LocalFiles
from teacher_cache.storage.files.transient import is_transient
from teacher_cache.storage.format.commits import ChunkRef
from teacher_cache.storage.format.table_rows import TableRows
from teacher_cache.storage.read.reader import EmbeddingReader
from teacher_cache.storage.write.writer import EmbeddingWriter
from tests.conftest import finish_known_cache, known_arrays, known_row, make_known_cache, plan_known_cache


def test_rows_come_in_the_order_asked_for(known_cache: Path) -> None:
    reader = EmbeddingReader(str(known_cache))
    rows = np.array([9, 0, 4, 4, 7])
    np.testing.assert_array_equal(reader.take("image", rows), np.stack([known_row("image", row) for row in rows]))
    np.testing.assert_array_equal(reader.take("text", rows, array="norm"), rows + 1)
    assert reader.take("image", np.array([], np.int64)).shape == (0, 8)


def test_each_object_is_read_once_while_it_fits(known_cache: Path) -> None:
    reader = EmbeddingReader(str(known_cache))
    for _ in range(3):
        reader.take("text", np.arange(25))
    assert reader.objects_read == 7


def test_memory_is_bounded_and_rows_stay_right(known_cache: Path) -> None:
    reader = EmbeddingReader(str(known_cache), memory_bytes=2 * 4 * 8 * 2)  # two chunks
    for row in (0, 24, 5, 13, 0, 24):
        np.testing.assert_array_equal(reader.take("text", np.array([row]))[0], known_row("text", row))
    assert reader.chunks.held_bytes <= 2 * 4 * 8 * 2


def test_unfinished_caches_are_unreadable(tmp_path: Path) -> None:
    plan_known_cache(tmp_path / "c")
    finish_known_cache(tmp_path / "c", chunks=2)
    with pytest.raises(CacheIncompleteError, match=r"2 of 10 chunks"):
        EmbeddingReader(str(tmp_path / "c"))


@pytest.mark.parametrize("row", [-1, 10])
def test_rows_outside_the_cache(known_cache: Path, row: int) -> None:
    with pytest.raises(IndexError, match=f"image row {row} asked for, rows are 0 to 9"):
        EmbeddingReader(str(known_cache)).take("image", np.array([3, row]))


def test_a_missing_or_swapped_chunk_is_named(known_cache: Path) -> None:
    """A swapped chunk has a valid checksum of its own; only the commit record tells."""
    second, third = (known_cache / f"targets.zarr/text/embedding/c/{chunk}/0" for chunk in (1, 2))
    second.unlink()
    reader = EmbeddingReader(str(known_cache))
    with pytest.raises(CacheCorruptError, match=r"text/embedding/c/1/0: missing, though committed"):
        reader.take("text", np.array([5]))
    shutil.copy(third, second)
    with pytest.raises(CacheCorruptError, match=r"text/embedding/c/1/0: checksum"):
        reader.take("text", np.array([5]))
    np.testing.assert_array_equal(reader.take("text", np.array([3]))[0], known_row("text", 3))


def test_quarantined_rows_are_left_out_and_never_returned(tmp_path: Path) -> None:
    make_known_cache(tmp_path / "c", lost=[6])
    reader = EmbeddingReader(str(tmp_path / "c"))
    assert reader.image_rows().tolist() == [0, 1, 2, 3, 4, 5, 7, 8, 9]
    assert reader.image_rows("train").tolist() == [0, 1, 2, 3, 4, 5, 7]
    assert [row.sample_id for row in reader.quarantined] == ["img-6"]
    with pytest.raises(CacheCorruptError, match="image row 6 was quarantined and has no embedding"):
        reader.take("image", np.array([5, 6]))


def test_captions_of_images(known_cache: Path) -> None:
    reader = EmbeddingReader(str(known_cache))
    # 25 captions over 10 images: images 0 to 4 have three, the others two
    rows, positions = reader.caption_rows(np.array([9, 0]))
    assert rows.tolist() == [23, 24, 0, 1, 2]
    assert positions.tolist() == [0, 0, 1, 1, 1]


def test_unknown_split_lists_the_known_ones(known_cache: Path) -> None:
    with pytest.raises(UsageError, match=r"no split 'val'; this cache has 'train' \(8 images\), 'test' \(2 images\)"):
        EmbeddingReader(str(known_cache)).image_rows("val")


def test_sample_ids_give_their_rows(known_cache: Path) -> None:
    reader = EmbeddingReader(str(known_cache))
    assert reader.rows_of(["img-9", "img-0", "img-9"]).tolist() == [9, 0, 9]
    assert reader.rows_of([]).tolist() == []
    with pytest.raises(UsageError, match=r"no image has the sample_id 'img-10', nor 1 others"):
        reader.rows_of(["img-3", "img-10", "x"])


def test_a_reader_says_what_it_reads(known_cache: Path) -> None:
    reader = EmbeddingReader(str(known_cache))
    assert len(reader) == 10
    assert repr(reader) == f"<EmbeddingReader {known_cache}: 10 images in 1 view(s), 25 captions, 8 x float16>"


def test_a_rewritten_chunk_with_a_fitting_commit_is_not_the_sealed_one(known_cache: Path) -> None:
    """Digests that agree with each other, but not with the manifest that a student recorded."""
    writer = EmbeddingWriter(str(known_cache))
    ref = ChunkRef("text", 0, 0)
    arrays = known_arrays(writer, ref)
    arrays["norm"] = arrays["norm"] + 1
    writer.replaces.add(ref)
    writer.write(ref, arrays)
    with pytest.raises(CacheCorruptError, match="the commit records are not those that the cache was sealed with"):
        EmbeddingReader(str(known_cache)).take("text", np.array([20]))


def test_a_whole_cache_behind_a_url() -> None:
    """Plan, write, seal, verify and read on an fsspec location."""
    url = f"memory://{uuid.uuid4()}/a.cache"
    make_known_cache(url)
    assert EmbeddingWriter(url).pending() == []
    assert verify_cache(url).ok
    np.testing.assert_array_equal(EmbeddingReader(url).take("image", np.array([7]))[0], known_row("image", 7))


def read_captions(cache: Path) -> None:
    reader = EmbeddingReader(str(cache))
    reader.take("text", np.arange(len(reader.captions)))


@pytest.mark.parametrize(
    "key",
    [
        "targets.zarr/text/embedding/c/1/0",
        "commits/text/000001.json",
        "captions/000000.parquet",
        "manifest.json",
    ],
)
def test_what_lies_in_an_objects_place_is_named(known_cache: Path, key: str) -> None:
    (known_cache / key).unlink()
    (known_cache / key).mkdir()
    with pytest.raises(CacheCorruptError, match=f"{key}: cannot be read: Is a directory. Remove what is in its place"):
        read_captions(known_cache)


@pytest.mark.parametrize("key", ["targets.zarr/text/embedding/c/1/0", "commits/text/000001.json"])
def test_an_input_output_error_names_the_object_and_may_pass(known_cache: Path, key: str) -> None:
    (known_cache / key).unlink()
    (known_cache / key).symlink_to("/proc/self/mem")  # opens, and answers the first read with EIO
    with pytest.raises(CacheUnreachableError, match=r"cannot be read: Input/output error. Try again") as caught:
        EmbeddingReader(str(known_cache)).take("text", np.arange(25))
    assert key in str(caught.value)
    assert is_transient(caught.value)


@pytest.mark.parametrize("damage", ["missing", "flipped"])
def test_a_damaged_manifest_says_that_its_backup_helps(known_cache: Path, damage: str) -> None:
    path = known_cache / "manifest.json"
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes().replace(b"flickr", b"flickR"))
    with pytest.raises(CacheCorruptError, match=r"manifest.json.*[Rr]un teacher-cache repair"):
        EmbeddingReader(str(known_cache))


def test_the_remedy_of_a_damaged_chunk_commit_and_table_is_repair(known_cache: Path) -> None:
    for key in ("targets.zarr/text/embedding/c/1/0", "commits/text/000001.json", "captions/000000.parquet"):
        data = (known_cache / key).read_bytes()
        for damaged in (None, b"damaged"):
            (known_cache / key).unlink()
            if damaged is not None:
                (known_cache / key).write_bytes(damaged)
            with pytest.raises(CacheCorruptError, match=f"{key}.*teacher-cache repair CACHE"):
                read_captions(known_cache)
            (known_cache / key).write_bytes(data)


def test_a_cache_that_is_just_being_planned_is_incomplete_not_damaged(tmp_path: Path) -> None:
    """The backup is written before the manifest, and a reader may come in between."""
    plan_known_cache(tmp_path / "c")
    (tmp_path / "c" / "manifest.json").unlink()
    with pytest.raises(CacheIncompleteError, match=r"0 of 10 chunks"):
        EmbeddingReader(str(tmp_path / "c"))


def test_a_whole_cache_that_came_while_it_was_opened_is_read(
    known_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = known_cache / "manifest.json"
    data = manifest.read_bytes()
    manifest.unlink()
    read = LocalFiles.read

    def slow(self: LocalFiles, key: str) -> bytes:
        try:
            return read(self, key)
        finally:
            manifest.write_bytes(data)

    monkeypatch.setattr(LocalFiles, "read", slow)
    assert len(EmbeddingReader(str(known_cache)).take("image", np.arange(10))) == 10


@pytest.mark.parametrize("bits", [0x7E00, 0xFE00, 0x7C01, 0xFC01])
def test_nan_that_nobody_quarantined_is_damage(tmp_path: Path, bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a writer that did not look: every digest fits."""
    monkeypatch.setattr(EmbeddingWriter, "_check", lambda *_: None)

    def put_nan(ref: ChunkRef, arrays: dict[str, np.ndarray]) -> None:
        if ref == ChunkRef("text", 0, 1):
            arrays["embedding"].view(np.uint16)[2, 3] = bits

    plan_known_cache(tmp_path / "c")
    finish_known_cache(tmp_path / "c", change=put_nan)
    with pytest.raises(CacheCorruptError, match="text/embedding/c/1/0: row 6 is NaN and was not quarantined"):
        EmbeddingReader(str(tmp_path / "c")).take("text", np.array([4]))


def test_opening_reads_the_manifest_and_the_first_rows_each_commit_once(
    known_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A reader that is sent to a worker takes both with it."""
    read, keys = LocalFiles.read, Counter[str]()

    def counting(self: LocalFiles, key: str) -> bytes:
        keys[key] += 1
        return read(self, key)

    monkeypatch.setattr(LocalFiles, "read", counting)
    reader = EmbeddingReader(str(known_cache))
    assert (reader.views, reader.embed_dim, keys) == (1, 8, {"manifest.json": 1})
    assert reader.quarantined == ()
    for _ in range(2):
        reader.take("image", np.arange(10))
        list(reader.stream("text", [np.arange(25)]))
        reader = pickle.loads(pickle.dumps(reader))
    commits = {key: count for key, count in keys.items() if key.startswith("commits/")}
    assert (keys["manifest.json"], len(commits), set(commits.values())) == (1, 10, {1})


def test_splits_and_captions_are_found_in_tables_of_many_parts(
    known_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether or not the tables are in memory; nothing of them stays there that was not."""
    for name, rows in (("_ROWS_PER_FILE", 7), ("ROWS_PER_GROUP", 3)):
        monkeypatch.setattr(f"teacher_cache.storage.format.tables.{name}", rows)
    path = tmp_path / "parted.cache"
    make_known_cache(path)
    assert len(list((path / "captions").iterdir())) == 4
    wanted = EmbeddingReader(str(known_cache))
    parted, held = EmbeddingReader(str(path)), EmbeddingReader(str(path))
    assert (held.samples.num_rows, held.captions.num_rows) == (10, 25)
    for reader in (parted, held):
        assert reader.caption_offsets.tolist() == wanted.caption_offsets.tolist()
        for split in (None, "train", "test"):
            assert reader.image_rows(split).tolist() == wanted.image_rows(split).tolist()
        reader.require_captions(reader.image_rows(), "")
    assert not {"samples", "captions"} & parted.__dict__.keys()
    (path / "captions" / "000002.parquet").unlink()
    with pytest.raises(CacheCorruptError, match=r"captions/000002\.parquet: missing"):
        EmbeddingReader(str(path)).caption_offsets  # noqa: B018


def test_captions_in_disorder_are_named(known_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = [pa.table({"image_row": [0, 2]}), pa.table({"image_row": [1]})]
    monkeypatch.setattr(TableRows, "parts", lambda _: parts)
    with pytest.raises(CacheCorruptError, match=r"known\.cache/captions: not sorted by image row from 0 to 9"):
        EmbeddingReader(str(known_cache)).caption_offsets  # noqa: B018


def test_a_folder_need_not_be_named_in_utf8(known_cache: Path, tmp_path: Path) -> None:
    folder = tmp_path / os.fsdecode(b"caf\xe9")
    shutil.copytree(known_cache, folder)
    reader, wanted = EmbeddingReader(str(folder)), EmbeddingReader(str(known_cache))
    assert reader.image_rows("test").tolist() == wanted.image_rows("test").tolist()
    assert reader.caption_offsets.tolist() == wanted.caption_offsets.tolist()


@pytest.mark.parametrize("rows", [9, 11])
def test_a_table_of_another_length_puts_no_row_into_a_split(
    known_cache: Path, monkeypatch: pytest.MonkeyPatch, rows: int
) -> None:
    monkeypatch.setattr(TableRows, "parts", lambda _: [pa.table({"split": ["test"] * rows})])
    with pytest.raises(CacheCorruptError, match=f"samples: {rows} rows, the manifest says 10"):
        EmbeddingReader(str(known_cache)).image_rows("test")


def test_a_table_that_cannot_be_read_any_more_is_named(known_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: pq.ParquetFile, group: int, **settings: object) -> pa.Table:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(pq.ParquetFile, "read_row_group", broken)
    with pytest.raises(CacheUnreachableError, match=r"captions/000000\.parquet"):
        EmbeddingReader(str(known_cache)).caption_offsets  # noqa: B018


def test_a_manifest_of_another_digest_is_refused(known_cache: Path) -> None:
    digest = EmbeddingReader(str(known_cache)).manifest.digest
    assert EmbeddingReader(str(known_cache), manifest_digest=digest).manifest.digest == digest
    with pytest.raises(CacheMismatchError, match=r"its manifest is \w{12}, 000000000000 was asked for"):
        EmbeddingReader(str(known_cache), manifest_digest="0" * 64)
