"""``plan``: what it says a precompute will take, against the precompute; nothing is written that stays."""

from __future__ import annotations

import json
import re
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
    assert half.check_seconds == 0 < fresh.check_seconds  # the planner has read every file
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
    online = 30 * found.image.teacher_seconds_per_row + found.text.teacher_seconds_per_row
    assert found.online_epoch_seconds == pytest.approx(online)


def said_by_both(settings: PrecomputeConfig) -> str:
    """What precompute says when it refuses a cache, and ``--dry-run`` in the same words."""
    with pytest.raises(CacheMismatchError) as foretold:
        forecast(settings, probe=4)
    with pytest.raises(CacheMismatchError) as met:
        precompute(settings)
    assert str(foretold.value) == str(met.value)
    return str(met.value)


def test_a_cache_of_another_teacher_or_of_other_captions_is_refused(config: Config, tmp_path: Path) -> None:
    settings = config()
    precompute(settings)
    other = make_model_folder(tmp_path / "other" / "tiny", seed=1)
    named = r"p\.cache: this cache is not the one .*teacher\.weights_sha256: \"\w{12}\" in the cache"
    assert re.search(named, said_by_both(config(teacher=f"local-dir:{other}")))
    # as many images and captions
    captions = Path(settings.dataset.removeprefix("flickr:"), "captions.txt")
    captions.write_text(captions.read_text().replace("of colours", "of colors"))
    assert "lists 30 images, this cache holds 30: other captions or splits" in said_by_both(settings)


def listed(folder: Path, name: str, numbers: range) -> str:
    """A table of pictures with one caption each."""
    lines = [f"{number}.png,a caption of {number}" for number in numbers]
    (folder / name).write_text("\n".join(["path,caption", *lines]) + "\n")
    return f"table:{folder / name}"


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """A folder of 11 pictures, 0.png to 10.png."""
    folder = tmp_path / "pictures"
    for number in range(11):
        save_image(folder / f"{number}.png", 20 * number)
    return folder


def test_a_dataset_that_grew_is_refused_with_the_command_that_adds_the_rows(config: Config, pictures: Path) -> None:
    settings = config(dataset=listed(pictures, "pairs.csv", range(10)))
    precompute(settings)
    grown = config(dataset=listed(pictures, "grown.csv", range(11)))
    assert said_by_both(grown) == (
        f"{settings.cache}: the dataset lists 11 images, this cache holds 10: 1 image and 1 caption more. To add them: "
        f"teacher-cache precompute --dataset {grown.dataset} --teacher {grown.teacher} --reuse {settings.cache} "
        "--cache NEW"
    )
    half = config(dataset=listed(pictures, "half.csv", range(5, 11)))
    assert "lists 6 images, this cache holds 10: 1 image more; 5 images missing, the first: 0.png. To make" in (
        said_by_both(half)
    )
    other = config(dataset=listed(pictures, "other.csv", range(10, 11)))
    assert said_by_both(other) == (
        f"{settings.cache}: is of 10 images of {settings.dataset}, asked for is 1 of {other.dataset}. Choose another "
        "--cache, or name the dataset of this one."
    )


def test_what_was_lost_when_the_cache_was_made_is_no_growth(config: Config, pictures: Path) -> None:
    settings = config(dataset=listed(pictures, "pairs.csv", range(13)))  # 11.png and 12.png do not exist
    made = precompute(settings)
    found = forecast(settings, probe=4)
    assert (made.images, made.lost_images, found.images, found.captions) == (11, 2, 11, 11)
    assert found.committed_rows == 22
    (pictures / "3.png").unlink()
    with pytest.raises(CacheMismatchError, match=r"1 image missing, the first: 3\.png\. 3\.png: .*/3\.png does not ex"):
        precompute(settings)


def test_reuse_says_first_what_is_copied_and_what_is_encoded(
    config: Config, pictures: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old = config(dataset=listed(pictures, "pairs.csv", range(10)), views=2)
    precompute(old)
    grown = listed(pictures, "grown.csv", range(11))
    capsys.readouterr()
    said = (
        "10 images and 10 captions copied, 1 image and 1 caption to encode. It has 2 views, this cache gets 1: --views"
    )
    one = config(dataset=grown, reuse=old.cache, cache=f"{old.cache}1", views=1)
    precompute(one)
    assert f"from {old.cache}: {said} 2 copies all\n" in capsys.readouterr().err
    both = config(dataset=grown, reuse=old.cache, cache=f"{old.cache}2", views=2)
    line = f"from {old.cache}: 20 views and 10 captions copied, 2 views and 1 caption to encode"
    assert forecast(both, probe=4).reuse_line == line
    precompute(both)
    assert line in capsys.readouterr().err


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
    assert re.search(said, said_by_both(settings.model_copy(update=changes)))


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
    assert re.search(
        r"\ntime       [\d.]+ \w+ to encode on one cpu, after [\d.]+ \w+ to check all files\n", shown.stdout
    )
    assert re.search(r"\nit pays    once the students train \d epochs? in all: ", shown.stdout)

    monkeypatch.setattr(forecast_module, "_free_bytes", lambda cache: 1000)
    full = run.invoke(app, ["precompute", str(tmp_path / "run.toml"), "--dry-run"])
    assert full.exit_code == 1
    assert "1.0 kB free. Make room, or name another --cache." in full.stderr


def test_free_room_is_that_of_the_nearest_folder_there_is(tmp_path: Path) -> None:
    assert forecast_module._free_bytes(str(tmp_path / "not/yet/there.cache")) is not None
    assert forecast_module._free_bytes("s3://bucket/x.cache") is None
