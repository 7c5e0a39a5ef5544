"""Caches of int8 through the whole program: made, proven, mended, grown, copied, exported, learned from."""

from __future__ import annotations

import json
import shutil
import uuid
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from teacher_cache.pipeline.cli.app import app
from teacher_cache.pipeline.data.batches.pairs import Pairs
from teacher_cache.pipeline.data.batches.targets import CachedTeacher
from teacher_cache.pipeline.models.teacher import load_teacher
from teacher_cache.pipeline.precompute.plan import plan_precompute
from teacher_cache.pipeline.precompute.repair import repair
from teacher_cache.pipeline.precompute.reuse import CachedChunks
from teacher_cache.pipeline.precompute.run import precompute
from teacher_cache.pipeline.settings.precompute import PrecomputeConfig
from teacher_cache.storage.check.verify import verify_cache
from teacher_cache.storage.errors import CacheMismatchError
from teacher_cache.storage.format.tables import chunk_rows_sha256
from teacher_cache.storage.look.diff import diff_caches
from teacher_cache.storage.look.export import export_rows
from teacher_cache.storage.look.info import describe_cache
from teacher_cache.storage.look.stats import cache_stats
from teacher_cache.storage.read.reader import EmbeddingReader
from teacher_cache.storage.write.writer import EmbeddingWriter
from tests.conftest import cache_digest, make_model_folder, write_photos
from tests.object_store import ObjectStore
from tests.pipeline.precompute.conftest import settings as make_settings

BROKEN = 30
IMAGES = 48


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset with a broken image, its teacher, and caches of float16 and of int8 in chunks of 16 rows."""
    home = tmp_path_factory.mktemp("int8")
    make_model_folder(home / "teacher")
    write_photos(home / "photos", IMAGES)
    image = home / "photos" / "images" / f"{BROKEN:04d}.jpg"
    image.write_bytes(image.read_bytes()[:200])
    for dtype in ("float16", "int8"):
        precompute(PrecomputeConfig(**settings(home, f"{dtype}.cache", dtype=dtype)))
    return home


def settings(home: Path, cache: Path | str, dataset: str = "photos", **more: Any) -> dict[str, Any]:
    where = cache if "://" in str(cache) else home / cache
    return make_settings(home / dataset, home / "teacher", where, **{"batch_size": 8, "chunk_rows": 16, **more})


def test_it_is_sound_proven_and_says_what_it_is(home: Path) -> None:
    cache = str(home / "int8.cache")
    run = CliRunner().invoke(
        app, ["verify", cache, "--sample", "20", "--teacher", f"local-dir:{home / 'teacher'}", "--json"]
    )
    report = json.loads(run.stdout)
    assert (run.exit_code, report["ok"], report["quarantined"]) == (0, True, 1)
    assert 0.9999 < report["proof"]["least_cosine"] < 1
    assert "16 wide, int8" in CliRunner().invoke(app, ["info", cache]).stdout
    names = ("dataset", "teacher", "cache")
    plan = ["precompute", "--dry-run", *(f"--{name}={settings(home, cache)[name]}" for name in names)]
    forecast = json.loads(CliRunner().invoke(app, [*plan, "--device", "cpu", "--json"]).stdout)
    assert forecast["target_bytes"] == describe_cache(cache).target_bytes
    refused = CliRunner().invoke(app, [*plan, "--dtype", "float16"])
    assert isinstance(refused.exception, CacheMismatchError)


def test_its_rows_are_the_teachers_up_to_rounding(home: Path) -> None:
    found = diff_caches(str(home / "float16.cache"), str(home / "int8.cache"))
    assert [each.field for each in found.identity] == ["targets.dtype"]
    for drift, compared in ((found.images, IMAGES - 1), (found.captions, 2 * IMAGES - 2)):
        assert drift is not None
        assert (drift.compared, drift.equal) == (compared, 0)
        assert drift.cosine is not None
        assert drift.cosine.least > 0.9999
    whole, half = (cache_stats(str(home / name)) for name in ("float16.cache", "int8.cache"))
    assert (half.image.missing, half.image.norm) == (1, whole.image.norm)


def test_students_get_unit_targets(home: Path) -> None:
    rows = np.array([0, 5, 47])
    pairs = Pairs(rows, 2 * rows[:, None], np.zeros(3, np.int64))
    targets = {
        dtype: next(CachedTeacher(EmbeddingReader(str(home / f"{dtype}.cache"))).targets([pairs]))
        for dtype in ("float16", "int8")
    }
    for name in ("image", "text"):
        mine, theirs = getattr(targets["int8"], name).numpy(), getattr(targets["float16"], name).numpy()
        assert mine.dtype == np.float32
        np.testing.assert_allclose(np.linalg.norm(mine, axis=-1), 1, atol=1e-6)
        assert 0 < np.abs(mine - theirs).max() < 5e-3


def test_an_export_is_float16_of_unit_norm(home: Path, tmp_path: Path) -> None:
    made = export_rows(str(home / "int8.cache"), str(tmp_path / "out"))
    rows = np.load(tmp_path / "out" / "img_emb" / "img_emb_0.npy")
    assert (rows.dtype, len(rows), made.quarantined) == (np.float16, IMAGES - 1, 1)
    np.testing.assert_allclose(np.linalg.norm(rows.astype(np.float32), axis=1), 1, atol=2**-10)


def test_the_dtype_of_the_cache_is_kept_and_another_is_refused(home: Path) -> None:
    again = precompute(PrecomputeConfig(**settings(home, "int8.cache")))
    assert again.chunks_encoded == 0
    with pytest.raises(CacheMismatchError, match=r'targets.dtype: "int8" in the cache, "float16" asked for'):
        precompute(PrecomputeConfig(**settings(home, "int8.cache", dtype="float16")))


def test_repair_brings_back_the_same_bytes(home: Path, tmp_path: Path) -> None:
    cache = shutil.copytree(home / "int8.cache", tmp_path / "c")
    for key in ("image/scale/c/1/0/0", "text/embedding/c/2/0", "text/scale/c/5/0"):
        path = cache / "targets.zarr" / key
        data = bytearray(path.read_bytes())
        data[3] ^= 16
        path.write_bytes(data)
    (cache / "targets.zarr" / "text" / "scale" / "zarr.json").write_bytes(b"{}")
    done = repair(str(cache), teacher=f"local-dir:{home / 'teacher'}", device="cpu")
    assert (done.ok, done.chunks_encoded) == (True, 3)
    assert cache_digest(cache) == cache_digest(home / "int8.cache")


def test_more_views_in_int8(home: Path, tmp_path: Path) -> None:
    cache, old = tmp_path / "grown", str(home / "int8.cache")
    with pytest.raises(CacheMismatchError, match=r"2 asked for, .* --dtype int8 --views 2 --reuse "):
        precompute(PrecomputeConfig(**settings(home, Path(old), views=2)))
    precompute(PrecomputeConfig(**settings(home, cache, views=2, dtype="int8", reuse=old)))
    assert verify_cache(str(cache)).ok
    reader, before = EmbeddingReader(str(cache)), EmbeddingReader(str(home / "int8.cache"))
    rows = reader.image_rows()
    np.testing.assert_array_equal(reader.take("image", rows), before.take("image", rows))
    np.testing.assert_allclose(np.linalg.norm(reader.take("image", rows, 1), axis=1), 1, atol=1e-6)
    precompute(PrecomputeConfig(**settings(home, tmp_path / "whole", views=2, dtype="int8")))
    for ref, commit in EmbeddingReader(str(tmp_path / "whole")).commits().items():
        assert reader.commits()[ref] == commit


def test_whole_chunks_are_copied_bit_for_bit(home: Path, tmp_path: Path, taught: Counter[str]) -> None:
    """Behind the rows that are there, new ones: every full chunk but that of the broken image is copied."""
    write_photos(tmp_path / "more", IMAGES + 6)
    shutil.copy(home / "photos" / "images" / f"{BROKEN:04d}.jpg", tmp_path / "more" / "images" / f"{BROKEN:04d}.jpg")
    asked = settings(home, tmp_path / "c", dtype="int8") | {"dataset": f"flickr:{tmp_path / 'more'}"}
    made = precompute(PrecomputeConfig(**asked, reuse=str(home / "int8.cache")))
    assert made.rows_reused == {"image": 32, "text": 96}
    assert taught == {"image": 16 + 6, "text": 12}
    assert verify_cache(str(tmp_path / "c")).ok
    old, new = EmbeddingReader(str(home / "int8.cache")), EmbeddingReader(str(tmp_path / "c"))
    for ref in old.commits():
        assert new.commits()[ref].objects == old.commits()[ref].objects
    precompute(PrecomputeConfig(**{**asked, "cache": str(tmp_path / "alone")}))
    assert cache_digest(tmp_path / "c") == cache_digest(tmp_path / "alone")


def test_rows_of_the_other_dtype_are_not_copied(home: Path, tmp_path: Path) -> None:
    for dtype, other in (("int8", "float16"), ("float16", "int8")):
        asked = settings(home, tmp_path / dtype, dtype=dtype, reuse=str(home / f"{other}.cache"))
        with pytest.raises(CacheMismatchError, match=rf"ask for --dtype {other} as it has them, or leave --reuse out"):
            precompute(PrecomputeConfig(**asked))
        assert not (tmp_path / dtype).exists()


def test_a_chunk_that_moved_is_found_and_one_that_changed_is_not(home: Path, tmp_path: Path) -> None:
    config = PrecomputeConfig(**settings(home, tmp_path / "c", dtype="int8"))
    plan_precompute(config, load_teacher(config.teacher, None, "cpu", "fp32"))
    writer = EmbeddingWriter(str(tmp_path / "c"))

    def moved(by: int) -> CachedChunks:
        """As if the captions began so many rows further on."""
        return CachedChunks(
            str(home / "int8.cache"),
            writer.manifest.identity,
            lambda _, rows: chunk_rows_sha256(writer.captions.read(range(rows.start + by, rows.stop + by)), "text"),
        )

    ref = next(ref for ref in EmbeddingReader(str(home / "int8.cache")).commits() if ref.tower == "text")
    found, arrays = moved(16).take(ref, range(16))  # the second chunk becomes the first one
    assert found.all()
    np.testing.assert_array_equal(
        arrays["embedding"],
        EmbeddingReader(str(home / "int8.cache")).stored_chunk(ref._replace(chunk=1))["embedding"],
    )
    assert (moved(16).count(ref, range(16)), moved(16).count(ref, range(8))) == (16, 0)
    assert not moved(1).take(ref, range(16))[0].any()


def test_on_an_object_store_it_is_the_same_cache(
    home: Path, moto: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in moto.environment.items():
        monkeypatch.setenv(name, value)
    cache = moto.location(f"{uuid.uuid4()}/int8.cache")
    precompute(PrecomputeConfig(**settings(home, cache, dtype="int8")))
    assert cache_digest(cache) == cache_digest(home / "int8.cache")
    reader = EmbeddingReader(cache)
    rows = reader.image_rows()
    np.testing.assert_array_equal(
        reader.take("image", rows), EmbeddingReader(str(home / "int8.cache")).take("image", rows)
    )
