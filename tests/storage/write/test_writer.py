"""Whole chunks, commit last, the same bytes however often the work was interrupted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from teacher_cache.storage.errors import CacheCorruptError, CacheIncompleteError, CacheMismatchError
from teacher_cache.storage.format.arrays import encode_object
from teacher_cache.storage.format.commits import ChunkRef, QuarantinedRow
from teacher_cache.storage.format.journal import ChunkCost
from teacher_cache.storage.format.manifest import BACKUP_KEY, MANIFEST_KEY, Source
from teacher_cache.storage.write.plan import plan_cache
from teacher_cache.storage.write.writer import EmbeddingWriter
from tests.conftest import (
    cache_digest,
    finish_known_cache,
    known_arrays,
    make_identity,
    plan_known_cache,
    quarantined_row,
)


def test_pending_shrinks_chunk_by_chunk(tmp_path: Path) -> None:
    plan_known_cache(tmp_path / "c")
    writer = EmbeddingWriter(str(tmp_path / "c"))
    pending = writer.pending()
    assert [ref.name for ref in pending[:4]] == ["image/v0/000000", "image/v0/000001", "image/v0/000002", "text/000000"]
    assert len(pending) == 3 + 7
    writer.write(pending[1], known_arrays(writer, pending[1]))
    assert writer.pending() == pending[:1] + pending[2:]


def test_interrupted_writing_ends_in_the_same_bytes(known_cache: Path, tmp_path: Path) -> None:
    path = tmp_path / "interrupted"
    plan_known_cache(path)
    first = EmbeddingWriter(str(path))
    for ref in reversed(first.pending()[2:5]):
        first.write(ref, known_arrays(first, ref), cost=ChunkCost(rows=4, seconds=9.0))
    # a chunk whose commit was never written, and one whose bytes were damaged since
    pending = first.pending()
    first.write(pending[0], known_arrays(first, pending[0]))
    (path / pending[0].commit_key).unlink()
    first.write(pending[1], known_arrays(first, pending[1]))
    target = path / pending[1].object_keys()["norm"]
    target.write_bytes(target.read_bytes()[:-5] + b"12345")

    plan_known_cache(path)
    assert EmbeddingWriter(str(path)).pending() == pending
    finish_known_cache(path)
    assert cache_digest(path) == cache_digest(known_cache)


def test_sealing_an_unfinished_cache_is_refused(tmp_path: Path) -> None:
    plan_known_cache(tmp_path / "c")
    writer = finish_known_cache(tmp_path / "c", chunks=4)
    with pytest.raises(CacheIncompleteError, match=r"4 of 10 chunks are there. Run the same precompute command again"):
        writer.seal()


def test_sealing_again_changes_nothing(known_cache: Path) -> None:
    before = cache_digest(known_cache)
    EmbeddingWriter(str(known_cache)).seal()
    assert cache_digest(known_cache) == before


def test_rows_must_be_finite_unit_and_complete(tmp_path: Path) -> None:
    plan_known_cache(tmp_path / "c")
    writer = EmbeddingWriter(str(tmp_path / "c"))
    ref = ChunkRef("image", 0, 1)
    good = known_arrays(writer, ref)

    def refused(message: str, quarantined: tuple[QuarantinedRow, ...] = (), **changed: np.ndarray) -> None:
        with pytest.raises(ValueError, match=message):
            writer.write(ref, {**good, **changed}, quarantined)
        assert not (tmp_path / "c" / ref.commit_key).exists()

    nan = good["embedding"].copy()
    nan[2, 3] = np.nan
    refused("row 6 holds NaN or infinity", embedding=nan)
    refused("row 4 has norm 2.0", embedding=(good["embedding"] * 2).astype(np.float16))
    refused("3 rows, 4 wanted", norm=good["norm"][:3])
    refused("float32, at most", embedding=good["embedding"].astype(np.float32))
    lost = quarantined_row(6)
    refused("row 6 holds a value, though quarantined", quarantined=(lost,))
    half = good["embedding"].copy()
    half[2, 3] = np.nan
    refused("row 6 holds a value, though quarantined", quarantined=(lost,), embedding=half)
    view = good["view"].copy()
    view[0, 0] = np.nan
    refused("view: row 4 holds NaN", view=view)
    refused(r"quarantined rows \[9\] are not of this chunk", quarantined=(lost.model_copy(update={"row": 9}),))
    with pytest.raises(ValueError, match=r"arrays \['embedding', 'norm'\], \['embedding', 'norm', 'view'\] wanted"):
        writer.write(ref, {name: good[name] for name in ("embedding", "norm")})


def test_another_cache_at_the_path_is_refused(known_cache: Path) -> None:
    manifest = EmbeddingWriter(str(known_cache)).manifest
    source = Source(dataset="x", image_root="x")
    with pytest.raises(CacheMismatchError, match=r'teacher.precision: "fp32" in the cache, "bf16" asked for'):
        plan_cache(str(known_cache), make_identity(precision="bf16"), manifest.layout, source, {}, {})
    other = manifest.layout.model_copy(update={"image_chunk_rows": 8})
    with pytest.raises(
        CacheMismatchError, match=r"of 4 images and 4 captions in batches of 2 in the cache, 8, 4 and 2"
    ):
        plan_cache(str(known_cache), manifest.identity, other, source, {}, {})


def test_a_stray_file_is_not_sealed_in(known_cache: Path, tmp_path: Path) -> None:
    plan_known_cache(tmp_path / "c")
    (tmp_path / "c" / "commits").mkdir()
    (tmp_path / "c" / "commits" / ".DS_Store").write_bytes(b"?")
    finish_known_cache(tmp_path / "c")
    (tmp_path / "c" / "commits" / ".DS_Store").unlink()
    assert cache_digest(tmp_path / "c") == cache_digest(known_cache)


@pytest.mark.parametrize("plan", [{}, {"dtype": "int8"}, {"compressor": "blosc"}], ids=["float16", "int8", "blosc"])
def test_objects_that_an_interrupted_writer_left_are_kept(tmp_path: Path, plan: dict[str, Any]) -> None:
    """It rounded otherwise. What a slower writer may still have open must never be replaced."""
    plan_known_cache(tmp_path / "c", **plan)
    writer, ref = EmbeddingWriter(str(tmp_path / "c")), ChunkRef("text", 0, 6)
    arrays, norm = known_arrays(writer, ref), tmp_path / "c" / ref.object_keys()["norm"]
    other = EmbeddingWriter(str(tmp_path / "c"))
    other.write(ref, {**arrays, "norm": arrays["norm"] + 1})
    (tmp_path / "c" / ref.commit_key).unlink()
    (tmp_path / "c" / ref.object_keys()["embedding"]).unlink()
    left = norm.read_bytes()
    commit = writer.write(ref, arrays)
    assert norm.read_bytes() == left
    assert writer.is_sound(ref)
    assert writer.written == {ref}
    # who comes too late changes nothing, and gets the record that stands
    late = EmbeddingWriter(str(tmp_path / "c"))
    assert late.write(ref, arrays) == commit
    assert late.written == set()


def test_a_damaged_object_without_a_commit_record_is_named(tmp_path: Path) -> None:
    plan_known_cache(tmp_path / "c")
    writer, ref = EmbeddingWriter(str(tmp_path / "c")), ChunkRef("text", 0, 0)
    arrays, norm = known_arrays(writer, ref), tmp_path / "c" / ref.object_keys()["norm"]
    writer.write(ref, arrays)
    whole = norm.read_bytes()
    quarantined = np.array([np.nan, *arrays["norm"][1:]], np.float32)
    other_rows = encode_object(quarantined, (4,), np.dtype("<f4"))[0]
    for data, reason in ((whole[:-1], "19 bytes"), (other_rows, "row 0 holds NaN"), (b"?", "1 bytes")):
        (tmp_path / "c" / ref.commit_key).unlink(missing_ok=True)
        norm.write_bytes(data)
        with pytest.raises(CacheCorruptError, match=rf"{ref.object_keys()['norm']} of an interrupted run .*{reason}"):
            writer.write(ref, arrays)
        assert not writer.is_committed(ref)
    norm.write_bytes(b"")  # what a kill leaves on a file system without hard links
    writer.write(ref, arrays)
    assert norm.read_bytes() == whole


def test_an_interrupted_plan_is_finished_and_no_other_one_takes_its_place(tmp_path: Path) -> None:
    digest = plan_known_cache(tmp_path / "c").digest
    before = cache_digest(tmp_path / "c")
    for key in (MANIFEST_KEY, BACKUP_KEY, "captions/000000.parquet"):
        (tmp_path / "c" / key).unlink()
    with pytest.raises(CacheMismatchError, match=r"samples/000000.parquet of an interrupted run has other content"):
        plan_known_cache(tmp_path / "c", name="other")
    (tmp_path / "c" / "captions/000000.parquet").unlink()
    assert plan_known_cache(tmp_path / "c").digest == digest
    assert cache_digest(tmp_path / "c") == before
