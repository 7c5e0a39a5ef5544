"""Commit records in memory are those of the files, and small."""

from __future__ import annotations

import shutil
import tracemalloc
from pathlib import Path

import pytest

from teacher_cache.storage.files.local import LocalFiles
from teacher_cache.storage.format.commit_records import CommitRecords
from teacher_cache.storage.format.commits import ChunkRef, all_chunks, read_commit
from teacher_cache.storage.format.manifest_file import read_manifest
from teacher_cache.storage.read.reader import EmbeddingReader
from tests.conftest import make_known_cache


def records_of(cache: Path) -> CommitRecords:
    files = LocalFiles(str(cache))
    records = CommitRecords(read_manifest(files))
    records.read(files)
    return records


@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_each_record_is_the_one_on_disk(tmp_path: Path, dtype: str) -> None:
    make_known_cache(tmp_path / "c", lost=[5], dtype=dtype)
    files = LocalFiles(str(tmp_path / "c"))
    records, manifest = records_of(tmp_path / "c"), read_manifest(files)
    assert list(records) == all_chunks(manifest.layout)
    assert dict(records) == {ref: read_commit(files, manifest, ref) for ref in records}
    assert [commit.ref for commit in records.with_quarantined()] == [ChunkRef("image", 0, 1)]
    assert records.quarantined(ChunkRef("image", 0, 0)) == ()
    assert records.digest(ChunkRef("text", 0, 6), "norm") == records[ChunkRef("text", 0, 6)].objects["norm"]


def test_only_what_was_read_is_there(known_cache: Path) -> None:
    files = LocalFiles(str(known_cache))
    manifest = read_manifest(files)
    (known_cache / ChunkRef("text", 0, 3).commit_key).unlink()
    records = CommitRecords(manifest)
    assert len(records) == 0
    records.read(files)
    assert set(records) == set(all_chunks(manifest.layout)) - {ChunkRef("text", 0, 3)}
    # a view that does not exist, and places that would be another chunk's if they were counted through
    for ref in (ChunkRef("image", 1, 0), ChunkRef("image", 0, 3), ChunkRef("image", 0, -1), ChunkRef("text", 1, 0)):
        assert ref not in records
        with pytest.raises(KeyError):
            records[ref]
        with pytest.raises(KeyError):
            records.digest(ref, "norm")
    assert "image" not in records


def test_the_digest_is_what_the_seal_names(known_cache: Path) -> None:
    files = LocalFiles(str(known_cache))
    manifest = read_manifest(files)
    assert manifest.seal is not None
    assert CommitRecords(manifest).read(files) == manifest.seal.commits_sha256
    shutil.rmtree(known_cache / "commits/text")
    assert CommitRecords(manifest).read(files) != manifest.seal.commits_sha256


def test_a_reader_keeps_a_few_hundred_bytes_of_a_chunk(tmp_path: Path) -> None:
    """What is counted is what stays: from a small cache to one of ten times the chunks."""
    kept = []
    for images in (20, 200):
        make_known_cache(tmp_path / str(images), images=images, captions=images, chunk_rows=1)
        tracemalloc.start()
        reader = EmbeddingReader(str(tmp_path / str(images)))
        before = tracemalloc.get_traced_memory()[0]
        commits = reader.commits()
        kept.append((len(commits), tracemalloc.get_traced_memory()[0] - before))
        tracemalloc.stop()
    (few, of_few), (many, of_many) = kept
    assert (few, many) == (40, 400)
    assert (of_many - of_few) / (many - few) < 300
