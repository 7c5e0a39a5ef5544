"""Whole chunks, commit last, the same bytes however often the work was interrupted."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from teacher_cache.storage.errors import CacheIncompleteError, CacheMismatchError
from teacher_cache.storage.format.commits import ChunkRef, QuarantinedRow
from teacher_cache.storage.format.journal import ChunkCost
from teacher_cache.storage.format.manifest import Source
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
