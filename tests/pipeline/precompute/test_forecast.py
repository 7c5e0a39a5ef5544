"""``plan``: what it says a precompute will take, against the precompute; nothing is written that stays."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from teacher_cache.pipeline.cli.app import app
from teacher_cache.pipeline.models.teacher import load_teacher
from teacher_cache.pipeline.precompute import forecast as forecast_module
from teacher_cache.pipeline.precompute.encode import encode_chunks
from teacher_cache.pipeline.precompute.forecast import epochs_to_pay, forecast
from teacher_cache.pipeline.precompute.plan import plan_precompute
from teacher_cache.pipeline.precompute.run import precompute
from teacher_cache.pipeline.settings.precompute import PrecomputeConfig
from teacher_cache.storage.errors import CacheCorruptError, CacheMismatchError, UsageError
from tests.conftest import cache_digest, make_model_folder
from tests.pipeline.data.dataset_files import save_image
from tests.pipeline.precompute.conftest import make_config

run = CliRunner()
Config = Callable[..., PrecomputeConfig]


@pytest.fixture
def config(make_photos: Callable[..., Path], tiny_teacher: Path, tmp_path: Path) -> Config:
    """Settings for thirty photographs and a tiny teacher on the CPU."""
    photos = make_photos(30)

    def make(**changes: Any) -> PrecomputeConfig:
        dataset = {"dataset": f"flickr:{photos}", "chunk_rows": None, **changes}
        return make_config(photos, tiny_teacher, tmp_path / "p.cache", **dataset)

    return make


def test_rows_and_bytes_are_those_that_precompute_then_writes(config: Config, tmp_path: Path) -> None:
    settings = config(chunk_rows=8, views=2, crop_flip=0.25)
    found = forecast(settings, probe=12)
    assert not Path(settings.cache).exists()
    assert (found.images, found.captions, found.views, found.chunks) == (30, 60, 2, 4 * 2 + 8)
    assert (found.probe_images, found.probe_captions, found.image.rows, found.probe_lost) == (12, 4, 4, 0)
    assert found.committed_rows == 0
    assert found.image.seconds_per_row >= found.image.teacher_seconds_per_row > 0
    expected = 60 * found.image.seconds_per_row + 60 * found.text.seconds_per_row
    assert found.encode_seconds == pytest.approx(expected)
    online = 30 * (found.image.teacher_seconds_per_row + found.text.teacher_seconds_per_row)
    assert found.online_epoch_seconds == pytest.approx(online)
    assert found.epochs_to_pay == epochs_to_pay(found.check_seconds + found.encode_seconds, online)

    precompute(settings)
    files = [path for path in (tmp_path / "p.cache/targets.zarr").rglob("*") if path.is_file()]
    assert found.target_bytes == sum(path.stat().st_size for path in files if path.name != "zarr.json")
    assert found.chunks == len(list((tmp_path / "p.cache/commits").rglob("*.json")))
    after = forecast(settings, probe=8)
    assert (after.committed_rows, after.encode_seconds) == (2 * 30 + 60, 0)


def test_room_is_wanted_for_what_is_not_there_yet(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = config(chunk_rows=8)
    fresh = forecast(settings, probe=30)
    assert fresh.needed_bytes == fresh.target_bytes + fresh.table_bytes
    refs = plan_precompute(settings, load_teacher(settings.teacher, device="cpu"))
    encode_chunks(settings, load_teacher(settings.teacher, device="cpu"), refs[:2])
    half = forecast(settings, probe=30)
    assert half.committed_rows == 16
    left = 14 * half.image.seconds_per_row + 60 * half.text.seconds_per_row
    assert half.encode_seconds == pytest.approx(left)
    objects = [path for path in Path(settings.cache, "targets.zarr").rglob("c/**/*") if path.is_file()]
    assert half.needed_bytes == half.target_bytes - sum(path.stat().st_size for path in objects) > 0
    precompute(settings)
    tables = [path for name in ("samples", "captions", "problems") for path in Path(settings.cache, name).iterdir()]
    assert len(tables) == 3
    assert fresh.table_bytes == sum(path.stat().st_size for path in tables)
    monkeypatch.setattr(forecast_module, "_free_bytes", lambda cache: 0)
    done = forecast(settings, probe=30)
    assert (done.needed_bytes, done.fits) == (0, True)


def test_prompts_of_labelled_images_are_measured_though_one_image_has_them_all(config: Config, tmp_path: Path) -> None:
    for number in range(30):
        save_image(tmp_path / "pictures" / "abcdef"[number // 5] / f"{number}.png", 8 * number)
    found = forecast(config(dataset=f"labelled:{tmp_path / 'pictures'}?form=imagefolder"), probe=4)
    assert (found.images, found.captions, found.probe_images, found.probe_captions) == (30, 18, 4, 4)
    assert found.text.seconds_per_row > 0
    expected = 30 * found.image.seconds_per_row + 18 * found.text.seconds_per_row
    assert found.encode_seconds == pytest.approx(expected)


def test_a_cache_of_something_else_is_not_taken_for_this_one(
    config: Config, make_photos: Callable[..., Path], tmp_path: Path
) -> None:
    settings = config()
    precompute(settings)
    other = make_model_folder(tmp_path / "other" / "tiny", seed=1)
    with pytest.raises(CacheMismatchError, match=r"p\.cache: this cache is not the one .*teacher\.weights_sha256"):
        forecast(config(teacher=f"local-dir:{other}"), probe=4)
    fewer = f"flickr:{make_photos(20, 'fewer')}"
    with pytest.raises(CacheMismatchError, match=r"dataset\.images: 30 in the cache, 20 asked for"):
        forecast(config(dataset=fewer), probe=4)
    # as many images and captions
    captions = Path(settings.dataset.removeprefix("flickr:"), "captions.txt")
    captions.write_text(captions.read_text().replace("of colours", "of colors"))
    with pytest.raises(CacheMismatchError, match=r"one asked for\. dataset\.captions_sha256: [^;]*asked for\. "):
        forecast(settings, probe=4)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"chunk_rows": 16}, "chunks of 8 images and 8 captions in batches of 4 in the cache, 16, 16 and 4 asked for"),
        ({"batch_size": 8}, "in batches of 4 in the cache, 8, 8 and 8 asked for"),
        ({"crop_scale": (0.5, 1.0)}, "views.scale"),
        ({"views": 3}, r"views\.count: 2 in the cache, 3 asked for"),
    ],
    ids=["chunks", "batches", "crops", "views"],
)
def test_what_precompute_would_refuse_of_a_cache_is_refused_in_its_words(
    config: Config, changes: dict[str, Any], said: str
) -> None:
    settings = config(chunk_rows=8, views=2)
    precompute(settings)
    asked = settings.model_copy(update=changes)
    with pytest.raises(CacheMismatchError, match=said) as foretold:
        forecast(asked, probe=4)
    with pytest.raises(CacheMismatchError) as met:
        precompute(asked)
    assert str(foretold.value) == str(met.value)


def test_a_cache_without_manifest_is_refused_and_not_restored(config: Config) -> None:
    settings = config()
    precompute(settings)
    Path(settings.cache, "manifest.json").unlink()
    before = cache_digest(settings.cache)
    with pytest.raises(CacheCorruptError, match=r"manifest\.json is missing, .* Run teacher-cache repair CACHE"):
        forecast(settings, probe=4)
    assert cache_digest(settings.cache) == before


@pytest.mark.parametrize(
    ("cache", "epoch", "epochs"), [(0.0, 1.0, 1), (9.9, 5.0, 2), (10.0, 5.0, 3), (1.0, 5.0, 1), (1.0, 0.0, None)]
)
def test_a_cache_pays_from_the_first_epoch_at_which_the_teacher_took_longer(
    cache: float, epoch: float, epochs: int | None
) -> None:
    assert epochs_to_pay(cache, epoch) == epochs
    if epochs is not None:
        assert epochs * epoch > cache
        assert (epochs - 1) * epoch <= cache


def test_images_that_cannot_be_read_are_counted_and_none_at_all_is_refused(config: Config) -> None:
    settings = config()
    images = sorted(Path(settings.dataset.removeprefix("flickr:")).glob("images/*"))
    for path in images[:5]:
        path.unlink()
    found = forecast(settings, probe=30)
    assert (found.images, found.probe_images, found.probe_lost) == (30, 25, 5)
    for path in images[5:]:
        path.unlink()
    with pytest.raises(UsageError, match=r"not one of the 8 images of the probe can be read, the first: .*images/"):
        forecast(settings, probe=8)


def test_the_command_takes_the_settings_of_precompute(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = config()
    (tmp_path / "run.toml").write_text(
        f'cache = "{settings.cache}"\n[precompute]\ndataset = "{settings.dataset}"\n'
        f'teacher = "{settings.teacher}"\ndevice = "cpu"\nbatch_size = 4\n'
    )
    done = run.invoke(app, ["precompute", str(tmp_path / "run.toml"), "--dry-run", "--views", "2", "--json"])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert (found["images"], found["views"], found["cache"]) == (30, 2, settings.cache)
    shown = run.invoke(app, ["precompute", str(tmp_path / "run.toml"), "--dry-run"])
    assert "rows       30 images and 60 captions in 2 chunks" in shown.stdout
    assert " on, over all students" in shown.stdout

    monkeypatch.setattr(forecast_module, "_free_bytes", lambda cache: 1000)
    full = run.invoke(app, ["precompute", str(tmp_path / "run.toml"), "--dry-run"])
    assert full.exit_code == 1
    assert "1.0 kB free. Make room, or name another --cache." in full.stderr


def test_free_room_is_that_of_the_nearest_folder_there_is(tmp_path: Path) -> None:
    assert forecast_module._free_bytes(str(tmp_path / "not/yet/there.cache")) is not None
    assert forecast_module._free_bytes("s3://bucket/x.cache") is None
