"""A cache to which views were added: read as it was before, mended beside who adds them, compared in all views."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

import teacher_cache.storage.write.writer
from teacher_cache.storage.check.repair import plan_repair, restore
from teacher_cache.storage.check.verify import verify_cache
from teacher_cache.storage.cli.app import app
from teacher_cache.storage.errors import CacheMismatchError
from teacher_cache.storage.files.location import LocalFiles
from teacher_cache.storage.format.identity import ViewsIdentity
from teacher_cache.storage.format.manifest import BACKUP_KEY, CacheManifest
from teacher_cache.storage.format.manifest_file import read_manifest
from teacher_cache.storage.look.diff import diff_caches
from teacher_cache.storage.read.opening import manifests_before
from teacher_cache.storage.read.reader import EmbeddingReader
from teacher_cache.storage.write.writer import EmbeddingWriter
from tests.conftest import known_arrays, make_known_cache, plan_known_cache

VIEWS = ViewsIdentity(policy="random-resized-crop", count=3, scale=(0.3, 1.0), ratio=(0.75, 1.25), flip=0.5, seed=0)


def plan_views(cache: Path, count: int = 3) -> None:
    """As precompute plans them, of a sealed cache or of one that is not finished."""
    files = LocalFiles(str(cache))
    views = VIEWS.model_copy(update={"count": count})
    teacher_cache.storage.write.plan._add_views(files, read_manifest(files), views, {"torch": "1"})


def finish(cache: Path, damage: bool = False) -> CacheManifest:
    """Encode what is pending, with rows that another view does not have, and seal."""
    writer = EmbeddingWriter(str(cache))
    for ref in writer.pending():
        arrays = known_arrays(writer, ref)
        if ref.view == 2 and damage:
            arrays["norm"] = arrays["norm"] * 2
        if ref.view:
            arrays["embedding"] = np.roll(arrays["embedding"], ref.view, axis=1)
        writer.write(ref, arrays)
    return writer.seal()


def test_it_is_read_as_it_was_by_the_digest_of_then(known_cache: Path) -> None:
    first = EmbeddingReader(str(known_cache)).manifest
    plan_views(known_cache, 2)
    planned = read_manifest(LocalFiles(str(known_cache)))
    two = finish(known_cache)
    plan_views(known_cache, 3)
    three = finish(known_cache)
    *between, last = list(manifests_before(three))
    assert last == first
    assert [manifest.digest for manifest in between if manifest.sealed] == [two.digest]
    assert planned.digest in {manifest.digest for manifest in between}
    for then, views in ((first, 1), (planned, 1), (two, 2), (three, 3)):
        reader = EmbeddingReader(str(known_cache), manifest_digest=then.digest)
        # a worker that is started later sees the same, whatever has come since
        for mine in (reader, pickle.loads(pickle.dumps(reader))):
            assert (mine.manifest, mine.views, mine.identity.views.count) == (then, views, views)
            np.testing.assert_array_equal(mine.take("image", np.arange(10)), reader.take("image", np.arange(10)))
    with pytest.raises(CacheMismatchError, match=r"its manifest is \w{12}, 000000000000 was asked for, and more than"):
        EmbeddingReader(str(known_cache), manifest_digest="0" * 64)


def test_a_repair_does_not_undo_views_that_came_since_it_looked(known_cache: Path) -> None:
    (known_cache / BACKUP_KEY).unlink()
    plan = plan_repair(str(known_cache))
    assert plan.root == (BACKUP_KEY,)
    plan_views(known_cache)
    grown = finish(known_cache)
    assert restore(plan) == []
    assert EmbeddingReader(str(known_cache)).manifest == grown
    assert verify_cache(str(known_cache)).ok
    (known_cache / BACKUP_KEY).unlink()
    assert restore(plan_repair(str(known_cache))) == [f"{BACKUP_KEY}: restored from manifest.json"]
    assert verify_cache(str(known_cache)).ok


def test_views_planned_in_an_unfinished_cache_are_gone_on_with_after_a_kill(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the manifest and Zarr's metadata, when no generation is sealed yet."""
    cache = tmp_path / "c"
    plan_known_cache(cache)
    with monkeypatch.context() as killed:
        killed.setattr(teacher_cache.storage.write.writer, "_write_metadata", lambda files, manifest: None)
        plan_views(cache)
    found = verify_cache(str(cache)).findings
    assert {finding.kind for finding in found if finding.key.startswith("targets.zarr")} == {"incomplete"}
    files = LocalFiles(str(cache))
    assert read_manifest(files).adds_views
    teacher_cache.storage.write.plan._write_metadata(files, read_manifest(files))
    finish(cache)
    assert verify_cache(str(cache)).ok


def test_what_differs_in_another_view_or_a_norm_is_a_difference(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        make_known_cache(tmp_path / name)
        plan_views(tmp_path / name)
        finish(tmp_path / name, damage=name == "c")
    a, b, c = (str(tmp_path / name) for name in ("a", "b", "c"))
    alike = diff_caches(a, b)
    assert (alike.same, alike.differs, alike.other_chunks) == (True, False, 0)
    few = diff_caches(a, b, most=3)  # of which the rows that were not drawn are known by their digests
    assert (few.same, few.sampled) == (True, True)
    other = diff_caches(a, c)
    assert (other.same, other.differs, other.other_chunks) == (False, True, 3)
    assert other.images is not None
    assert other.images.equal == other.images.compared == 10
    done = CliRunner().invoke(app, ["diff", a, c])
    assert done.exit_code == 1
    assert done.stdout.splitlines()[-2:] == ["3 chunks of other bytes, of all views, norms and crops", "they differ"]
