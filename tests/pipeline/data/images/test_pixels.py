"""Ready pixels are the very pixels that decoding would give, proven one by one, and never another's."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr
from PIL import Image, ImageOps

from teacher_cache.pipeline.data.batches.cached_samples import CachedSamples
from teacher_cache.pipeline.data.batches.pairs import stored_crops
from teacher_cache.pipeline.data.batches.student_images import StudentImages
from teacher_cache.pipeline.data.datasets.samples import ImageSource
from teacher_cache.pipeline.data.images.preprocess import Preprocess
from teacher_cache.pipeline.data.images.ready_pixels import ReadyPixels, read_record
from teacher_cache.pipeline.settings.train import PixelsConfig, TrainConfig
from teacher_cache.pipeline.train import make_pixels as making
from teacher_cache.pipeline.train.loop import train
from teacher_cache.pipeline.train.make_pixels import PixelsResult, make_pixels, plan_pixels
from teacher_cache.storage.errors import (
    CacheCorruptError,
    CacheIncompleteError,
    CacheMismatchError,
    CacheNotFoundError,
    UsageError,
)
from teacher_cache.storage.files.local import LocalFiles
from teacher_cache.storage.read.reader import EmbeddingReader
from tests.commands import run_command
from tests.conftest import cache_digest
from tests.pipeline.train.train_work import make_cache, make_student, train_config

IMAGES, TRAIN, VIEWS, CHUNK = 40, 32, 3, 8
CHUNKS = VIEWS * TRAIN // CHUNK
SIZE = 32


@pytest.fixture(scope="module")
def home(tiny_teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of 3 views, a student that sees 32 x 32, and finished pixels of the train split."""
    root = tmp_path_factory.mktemp("pixels")
    make_cache(root, tiny_teacher, IMAGES, views=VIEWS)
    make_student(root / "student.json")
    make_student(root / "large.json", image_size=48)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(making, "_CHUNK_ROWS", CHUNK)
        make(root, root / "ready")
    return root


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(making, "_CHUNK_ROWS", CHUNK)


@pytest.fixture
def ready(home: Path, tmp_path: Path) -> Path:
    """A copy of the finished pixels, to be damaged."""
    return Path(shutil.copytree(home / "ready", tmp_path / "ready"))


def settings(home: Path, out: Path, **changes: Any) -> PixelsConfig:
    given = {"student": str(home / "student.json"), "threads": 2, **changes}
    return PixelsConfig(cache=str(home / "photos.cache"), out=str(out), **given)


def learning(home: Path, out: Path, **changes: Any) -> TrainConfig:
    return train_config(home / "photos.cache", home / "student.json", out, **changes)


def make(
    home: Path, out: Path, progress: Callable[[str, int, int], None] | None = None, **changes: Any
) -> PixelsResult:
    return make_pixels(plan_pixels(settings(home, out, **changes)), progress)


def opened(home: Path, folder: Path, views: int = VIEWS, size: int = SIZE, split: str = "train") -> ReadyPixels:
    reader = EmbeddingReader(str(home / "photos.cache"))
    preprocess = Preprocess((size, size), (0.48, 0.46, 0.41), (0.27, 0.26, 0.28))
    return ReadyPixels(str(folder), reader, reader.image_rows(split), views, preprocess)


def test_each_image_is_what_pillow_makes_of_its_region(home: Path) -> None:
    """By hand from the photographs: the evaluation crop as shorter edge and centre, the others from the stored box."""
    pixels, reader = opened(home, home / "ready"), EmbeddingReader(str(home / "photos.cache"))
    mirrored = 0
    for row in range(TRAIN):
        with Image.open(home / "photos" / "images" / f"{row:04d}.jpg") as image:
            image.load()
        scale = SIZE / min(image.size)
        whole = image.resize(
            tuple(SIZE if edge == min(image.size) else int(edge * scale) for edge in image.size),
            Image.Resampling.BICUBIC,
        )
        left, top = (round((edge - SIZE) / 2) for edge in whole.size)
        expected = whole.crop((left, top, left + SIZE, top + SIZE))
        np.testing.assert_array_equal(pixels.shown(row, 0), np.asarray(expected), str(row))
        for view in range(1, VIEWS):
            top, left, height, width, flip = reader.take("image", np.array([row]), view, array="view")[0]
            expected = image.crop((left, top, left + width, top + height)).resize(
                (SIZE, SIZE), Image.Resampling.BICUBIC
            )
            mirrored += int(flip)
            expected = ImageOps.mirror(expected) if flip else expected
            np.testing.assert_array_equal(pixels.shown(row, view), np.asarray(expected), f"{row} {view}")
    assert 10 < mirrored < 54


@pytest.mark.parametrize(
    ("mode", "size"), [("shortest", (32, 32)), ("shortest", (24, 40)), ("longest", (32, 32)), ("squash", (32, 32))]
)
def test_what_the_student_gets_is_bit_for_bit_what_decoding_gives(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str, size: tuple[int, int]
) -> None:
    preprocess = Preprocess(size, (0.48, 0.46, 0.41), (0.27, 0.26, 0.28), resize_mode=mode)
    monkeypatch.setattr(making, "handed_on", lambda identity: {**preprocess.to_config()})
    make_student(tmp_path / "student.json", image_size=list(size))
    make(home, tmp_path / "ready", student=str(tmp_path / "student.json"))
    reader = EmbeddingReader(str(home / "photos.cache"))
    rows = reader.image_rows("train")
    pixels = ReadyPixels(str(tmp_path / "ready"), reader, rows, VIEWS, preprocess)
    decoded = StudentImages(reader, ImageSource(str(home / "photos")), preprocess)
    images = CachedSamples(reader, kept_chunks=1).records(rows)
    for view in range(VIEWS):
        for image, crop in zip(images, stored_crops(reader, rows, np.full(len(rows), view)), strict=True):
            seen = preprocess.normalized(pixels.shown(image.row, view))
            assert seen.shape == (3, *size)
            assert torch.equal(seen, decoded.see(image, crop))


def test_zarr_reads_the_same(home: Path) -> None:
    group = zarr.open_group(str(home / "ready" / "pixels.zarr"), mode="r")
    values, pixels = group["pixels"][:], opened(home, home / "ready")
    assert values.shape == (TRAIN, VIEWS, SIZE, SIZE, 3)
    assert group["row"][:].tolist() == list(range(TRAIN))
    for row in range(TRAIN):
        for view in range(VIEWS):
            np.testing.assert_array_equal(values[row, view], pixels.shown(row, view))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_run_logs_the_same_bytes_with_and_without(home: Path, tmp_path: Path, workers: int) -> None:
    """Two epochs of three views; the photographs are out of reach of the run that has pixels."""
    logs = []
    for name, changes in (
        ("decoded", {}),
        ("ready", {"pixels": str(home / "ready"), "image_root": str(tmp_path / "nowhere")}),
    ):
        run = learning(home, tmp_path / name, workers=workers, **changes)
        record = train(run).record
        logs.append((tmp_path / name / "log.jsonl").read_bytes())
        assert record.config.pixels == changes.get("pixels")
    assert logs[0] == logs[1]
    assert logs[0].count(b"\n") == 2 * TRAIN // 8


def test_a_run_may_go_on_with_and_without(home: Path, tmp_path: Path) -> None:
    """Stopped after some steps with pixels, resumed without them, the log is that of an unbroken run."""
    whole = learning(home, tmp_path / "whole")
    train(whole)

    def stop(at: Any) -> None:
        if at.step == 5:
            raise KeyboardInterrupt

    changes = {"out": str(tmp_path / "broken"), "checkpoint_steps": 1}
    with pytest.raises(KeyboardInterrupt):
        train(whole.model_copy(update={**changes, "pixels": str(home / "ready")}), stop)
    record = train(type(whole)(**{**whole.model_dump(), **changes, "pixels": ""}), resume=True).record
    assert record.resumed_at == (4,)
    assert record.config.pixels is None
    assert (tmp_path / "broken" / "log.jsonl").read_bytes() == (tmp_path / "whole" / "log.jsonl").read_bytes()


def damaged_row(path: Path, place: int = 3) -> None:
    data = bytearray(path.read_bytes())
    data[place * SIZE * SIZE * 3 + 100] ^= 1
    path.write_bytes(data)


def swapped(path: Path) -> None:
    """The chunk of another view of the same images: right in every length."""
    other = path.parents[4] / "1" / "2" / "0" / "0" / "0"
    shutil.copy(other, path)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            damaged_row,
            r"c/1/1/0/0/0: image row 11, view 1: 3,072 bytes with checksum .* were written. Delete this file",
        ),
        (lambda path: os.truncate(path, 3 * 3072 + 5), r"image row 11, view 1: 5 bytes with checksum"),
        (lambda path: os.truncate(path, 3 * 3072), r"image row 11, view 1: 0 bytes with checksum"),
        (lambda path: path.write_bytes(bytes(path.stat().st_size)), r"image row 11, view 1: 3,072 bytes with checksum"),
        (swapped, r"image row 11, view 1: 3,072 bytes with checksum"),
        (lambda path: path.unlink(), r"image row 11, view 1: the file is missing, though committed. Run the same"),
    ],
)
def test_damage_is_named_and_mended(
    home: Path, ready: Path, tmp_path: Path, damage: Callable[[Path], None], message: str
) -> None:
    path = ready / "pixels.zarr" / "pixels" / "c" / "1" / "1" / "0" / "0" / "0"
    before = cache_digest(ready)
    damage(path)
    with pytest.raises(CacheCorruptError, match=message):
        opened(home, ready).shown(11, 1)
    opened(home, ready).shown(11, 0)  # its neighbours are fine
    run = learning(home, tmp_path / "run", epochs=3, pixels=str(ready), workers=1)
    with pytest.raises(CacheCorruptError, match="view 1"):
        train(run)
    path.unlink(missing_ok=True)
    assert make(home, ready).chunks_made == 1
    assert cache_digest(ready) == before


@pytest.mark.parametrize("key", ["pixels.json", "commits/v1/000002.json", "pixels.zarr/row/c/0"])
def test_damaged_records_are_refused(home: Path, ready: Path, key: str) -> None:
    path = ready / key
    data = path.read_bytes()
    # a digit changed in the middle: still JSON, still as long
    at = next(
        index for index in range(len(data) // 2, len(data)) if data[index : index + 1].isdigit() or key.endswith("0")
    )
    path.write_bytes(data[:at] + (b"1" if data[at : at + 1] != b"1" else b"2") + data[at + 1 :])
    with pytest.raises(CacheCorruptError, match=str(path)):
        opened(home, ready)


def test_another_chunks_commit_is_refused(home: Path, ready: Path) -> None:
    for folder in ("commits/v2/000001.json", "commits/v1/000002.json"):
        copied = Path(shutil.copytree(ready, ready.parent / folder.replace("/", "-")))
        shutil.copy(copied / folder, copied / "commits/v1/000001.json")
        with pytest.raises(CacheCorruptError, match=r"commits/v1/000001.json: is of view \d, chunk \d"):
            opened(home, copied)
        assert make(home, copied).chunks_made == 1  # it counts for nothing
        assert cache_digest(copied) == cache_digest(home / "ready")


def test_pixels_of_something_else_are_refused_by_field(home: Path, tiny_teacher: Path, tmp_path: Path) -> None:
    ready, name = home / "ready", "ready: not what this student would see of"
    record = read_record(LocalFiles(str(ready)))
    sizes = r"size is \(32, 32\), wanted \(48, 48\). Give pixels and train the same train_image_size. Make pixels of"
    with pytest.raises(CacheMismatchError, match=f"{name} .*: {sizes}"):
        opened(home, ready, size=48)
    run = train_config(home / "photos.cache", home / "large.json", tmp_path / "run", pixels=str(ready))
    with pytest.raises(CacheMismatchError, match="size is"):
        train(run)
    assert not (tmp_path / "run" / "run.json").exists()
    reader = EmbeddingReader(str(home / "photos.cache"))
    bilinear = Preprocess((32, 32), (0.5,) * 3, (0.5,) * 3, interpolation="bilinear", resize_mode="squash")
    with pytest.raises(
        CacheMismatchError,
        match=r"interpolation is bicubic, wanted bilinear; resize_mode is shortest, wanted squash. Make pixels",
    ):
        ReadyPixels(str(ready), reader, reader.image_rows("train"), VIEWS, bilinear)
    # colours are put in afterwards: the same pixels serve any mean and std
    ReadyPixels(str(ready), reader, reader.image_rows("train"), VIEWS, Preprocess((32, 32), (0.0,) * 3, (1.0,) * 3))
    with pytest.raises(CacheMismatchError, match=r"split 'train', and not 8 of the 8 that this run uses, row 32 the"):
        opened(home, ready, split="test")
    make_cache(tmp_path / "others", tiny_teacher, IMAGES, first=1000, views=VIEWS)
    with pytest.raises(CacheMismatchError, match=f"images_sha256 is {record.images_sha256}, wanted "):
        opened(tmp_path / "others", ready)
    (tmp_path / "seeded").mkdir()
    make_cache(tmp_path / "seeded", tiny_teacher, IMAGES, views=VIEWS, view_seed=9)
    with pytest.raises(
        CacheMismatchError, match=rf"crops_sha256 is \('{record.crops_sha256[0]}', '{record.crops_sha256[1]}'\), wanted"
    ):
        opened(tmp_path / "seeded", ready)
    opened(tmp_path / "seeded", ready, views=1)  # no crop of it is drawn


def test_more_views_are_added_and_fewer_are_taken_as_they_are(home: Path, tmp_path: Path) -> None:
    out = tmp_path / "ready"
    assert make(home, out, views=1).chunks_made == TRAIN // CHUNK
    with pytest.raises(UsageError, match=r"holds 1 views, this run uses 3.* --views 3"):
        opened(home, out)
    opened(home, out, views=1)
    assert make(home, out).chunks_made == CHUNKS - TRAIN // CHUNK
    assert cache_digest(out) == cache_digest(home / "ready")
    assert make(home, out, views=2).chunks_made == 0
    assert cache_digest(out) == cache_digest(home / "ready")


def test_a_folder_of_something_else_is_not_written_to(home: Path, tmp_path: Path) -> None:
    with pytest.raises(CacheMismatchError, match=r"ready: holds other pixels: size is \(32, 32\), wanted \(48, 48\)"):
        plan_pixels(settings(home, home / "ready", student=str(home / "large.json")))
    with pytest.raises(CacheMismatchError, match=r"split is train, wanted test"):
        plan_pixels(settings(home, home / "ready", split="test"))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("of years")
    with pytest.raises(UsageError, match="mine: is there and holds no ready pixels"):
        plan_pixels(settings(home, tmp_path / "mine"))
    for config in (settings(home, tmp_path).model_copy(update={"out": "s3://bucket/pixels"}),):
        with pytest.raises(UsageError, match=r"s3://bucket/pixels: ready pixels are read image by image"):
            plan_pixels(config)
    with pytest.raises(UsageError, match="read image by image"):
        train(learning(home, tmp_path / "run", pixels="s3://bucket/pixels"))
    with pytest.raises(CacheNotFoundError, match="no ready pixels here"):
        train(learning(home, tmp_path / "run", pixels=str(tmp_path / "none")))


def test_a_disk_without_the_room_is_refused_with_numbers(
    home: Path, ready: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = CHUNKS * CHUNK * SIZE * SIZE * 3
    assert whole == 294_912
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=whole - 1))
    with pytest.raises(
        UsageError, match=r"32 images x 3 views x 32 x 32 x 3 bytes = 294.9 kB in 12 chunks; 12 of them to make"
    ):
        plan_pixels(settings(home, tmp_path / "new" / "folder"))
    assert not (tmp_path / "new").exists()
    # what is there already needs no room
    (ready / "pixels.zarr/pixels/c/0/0/0/0/0").unlink()
    assert plan_pixels(settings(home, ready)).bytes_to_write == CHUNK * SIZE * SIZE * 3


def test_an_image_that_changed_or_is_gone_stops_it_by_name(home: Path, tmp_path: Path) -> None:
    photos = Path(shutil.copytree(home / "photos", tmp_path / "photos"))
    (photos / "images" / "0020.jpg").write_bytes((photos / "images" / "0021.jpg").read_bytes())
    with pytest.raises(CacheMismatchError, match=r"0020.jpg: not the image that the cache was made of"):
        make(home, tmp_path / "ready", image_root=str(photos))
    with pytest.raises(CacheIncompleteError, match=r"of the 12 chunks that this run uses are not finished"):
        opened(home, tmp_path / "ready")
    (photos / "images" / "0020.jpg").unlink()
    with pytest.raises(OSError, match=r"row 20 .*0020.jpg cannot be read"):
        make(home, tmp_path / "ready", image_root=str(photos))
    assert make(home, tmp_path / "ready").chunks_made <= CHUNKS - 2 * VIEWS  # the first two chunks were kept
    assert cache_digest(tmp_path / "ready") == cache_digest(home / "ready")


_KILLED = """
import os, signal, sys
from pathlib import Path
from teacher_cache.pipeline.train import make_pixels as making
from teacher_cache.pipeline.settings.train import PixelsConfig, TrainConfig
making._CHUNK_ROWS = int(sys.argv[2])
moment, events = int(sys.argv[3]), 0
def event():
    global events
    if events == moment:
        os.kill(os.getpid(), signal.SIGKILL)
    events += 1
real = Path.replace
def replace(self, target):
    event()
    real(self, target)
    event()
Path.replace = replace
making.make_pixels(making.plan_pixels(PixelsConfig.model_validate_json(sys.argv[1])))
"""


@pytest.mark.parametrize("moment", [0, 1, 3, 9, 13, 16, 17, 18, 31])
def test_killed_at_any_moment_it_goes_on_to_the_same_bytes(home: Path, tmp_path: Path, moment: int) -> None:
    """Before and behind each rename: of the record, the metadata, a chunk, a commit."""
    out = tmp_path / "ready"
    config = settings(home, out).model_dump_json()
    done = subprocess.run([sys.executable, "-c", _KILLED, config, str(CHUNK), str(moment)], capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    commits = {path: path.stat().st_mtime_ns for path in out.glob("commits/*/*.json")}
    if (out / "pixels.json").exists():
        with pytest.raises((CacheIncompleteError, CacheNotFoundError)):
            opened(home, out)
    finished: list[int] = []
    result = make(home, out, lambda stage, done, total: finished.append(done))
    assert result.chunks_made == CHUNKS - len(commits)
    assert finished == list(range(len(commits) + 1, CHUNKS + 1))
    assert all(path.stat().st_mtime_ns == at for path, at in commits.items())
    assert cache_digest(out) == cache_digest(home / "ready")


def test_the_commands(home: Path, tmp_path: Path) -> None:
    """As typed: the plan is said first, training takes the folder, a folder that does not fit is one line."""
    cache = ("--cache", str(home / "photos.cache"))
    student, out = str(home / "student.json"), str(tmp_path / "ready")
    made = run_command("student", "pixels", *cache, "--student", student, "--out", out)
    assert made.returncode == 0, made.stderr
    assert made.stderr.startswith(
        f"{out}: 32 images x 3 views x 32 x 32 x 3 bytes = 589.8 kB in 3 chunks; 3 of them to make"
    )
    assert "pixels: 3 of 3" in made.stderr
    assert "32 images in 3 views at 32 x 32" in made.stdout
    common = (*cache, "--epochs", "1", "--batch-size", "8", "--set", "workers=0", "--pixels", out)
    trained = run_command("train", "--student", student, "--out", str(tmp_path / "run"), *common)
    assert trained.returncode == 0, trained.stderr
    refused = run_command("train", "--student", str(home / "large.json"), "--out", str(tmp_path / "other"), *common)
    assert refused.returncode == 1
    assert refused.stderr.count("\n") == 1
    assert refused.stderr.startswith(f"error: {out}: not what this student would see of")
