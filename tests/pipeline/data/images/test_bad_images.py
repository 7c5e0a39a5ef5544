"""Every odd image has its defined end, for the teacher and for students, and a run over all of them ends well."""

from __future__ import annotations

import io
import os
import socket
import warnings
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image

from teacher_cache.pipeline.data.batches.cached_samples import sample_records
from teacher_cache.pipeline.data.batches.student_images import StudentImages
from teacher_cache.pipeline.data.datasets import samples
from teacher_cache.pipeline.data.datasets.samples import ImageSource
from teacher_cache.pipeline.data.images import decode as module
from teacher_cache.pipeline.data.images.decode import FORMATS, MAX_PIXELS, UndecodableImageError, decode_image
from teacher_cache.pipeline.data.images.preprocess import Preprocess
from teacher_cache.pipeline.precompute.run import precompute
from teacher_cache.storage.check.verify import verify_cache
from teacher_cache.storage.files.location import open_files
from teacher_cache.storage.format.tables import PROBLEMS, read_table
from teacher_cache.storage.look.info import describe_cache
from teacher_cache.storage.read.reader import EmbeddingReader
from teacher_cache.storage.write.writer import read_manifest
from tests.pipeline.data.dataset_files import load, told
from tests.pipeline.data.odd_images import ODD_IMAGES, OddImage
from tests.pipeline.precompute.conftest import make_config

CLIP = Preprocess((32, 32), (0.48, 0.46, 0.41), (0.27, 0.26, 0.28))


def open_clips(image: Image.Image) -> torch.Tensor:
    """What open_clip's own transform makes of an image, with Pillow's warnings left aside."""
    transform = open_clip.image_transform(32, is_train=False, mean=CLIP.mean, std=CLIP.std)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pixels: torch.Tensor = transform(image)
    return pixels


@pytest.mark.parametrize("odd", ODD_IMAGES, ids=lambda odd: odd.name)
def test_each_has_its_defined_end(odd: OddImage, capfd: pytest.CaptureFixture[str]) -> None:
    if odd.lost:
        with pytest.raises((UndecodableImageError, ValueError)) as caught:
            CLIP.transform(decode_image(odd.data))
        assert odd.lost in str(caught.value)
        assert " at 0x" not in str(caught.value)
    else:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            wanted = open_clips(odd.like or Image.open(io.BytesIO(odd.data)))
        assert torch.equal(CLIP.transform(decode_image(odd.data)), wanted)
    assert capfd.readouterr().err == ""


def test_open_clip_alone_makes_16_bits_white() -> None:
    """Why ours are treated otherwise; once this fails, the rule in pipeline/data/images/decode.py can go."""
    [odd] = [odd for odd in ODD_IMAGES if odd.name == "16-bit.png"]
    seen = open_clips(Image.open(io.BytesIO(odd.data)))
    assert len(seen.unique()) <= 3 * 2
    assert len(CLIP.transform(decode_image(odd.data)).unique()) > 300


def test_the_limit_of_pixels_is_ours_whatever_pillows_is(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = io.BytesIO()
    Image.new("L", (300, 200)).save(whole, "PNG")
    assert decode_image(whole.getvalue()).size == (300, 200)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    monkeypatch.setattr(module, "MAX_PIXELS", 59_999)
    with pytest.raises(UndecodableImageError, match=r"^300 x 200 pixels, the most is 59,999$"):
        decode_image(whole.getvalue())
    assert MAX_PIXELS == 2 * (1024**3 // 4 // 3)


def test_an_image_that_would_not_fit_when_resized_is_refused_before() -> None:
    """224 pixels on the shorter side make 2.9 gigapixels of this one, which is 12 GB; it is never resized."""
    big = Preprocess((224, 224), CLIP.mean, CLIP.std)
    with pytest.raises(ValueError, match=r"1 x 60,000 pixels would be resized to 224 x 13,440,000 pixels, more than"):
        big.transform(Image.new("RGB", (1, 60_000)))


def test_a_large_image_is_decoded_without_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 50_000)
    whole = io.BytesIO()
    Image.new("L", (300, 200)).save(whole, "PNG")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert decode_image(whole.getvalue()).size == (300, 200)


@pytest.mark.timeout(300)
def test_a_run_over_all_of_them_ends_well_and_adds_up(
    tiny_teacher: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    photos = tmp_path / "odd"
    (photos / "images").mkdir(parents=True)
    for odd in ODD_IMAGES:
        (photos / "images" / odd.name).write_bytes(odd.data)
    images = photos / "images"
    (images / "folder.jpg").mkdir()
    (images / "loop.jpg").symlink_to("loop.jpg")
    (images / "dangling.jpg").symlink_to("nowhere.jpg")
    os.mkfifo(images / "pipe.jpg")
    with socket.socket(socket.AF_UNIX) as unix:
        unix.bind(str(images / "socket.jpg")) if len(str(images)) < 90 else os.mkfifo(images / "socket.jpg")
    (images / "device.jpg").symlink_to("/dev/zero")
    (images / "unlisted.jpg").write_bytes(ODD_IMAGES[0].data)
    no_files = ["folder.jpg", "loop.jpg", "dangling.jpg", "pipe.jpg", "socket.jpg", "device.jpg"]
    names = [odd.name for odd in ODD_IMAGES] + no_files
    (photos / "captions.txt").write_text("image,caption\n" + "".join(f"{name},A caption.\n" for name in names))

    result = precompute(make_config(photos, tiny_teacher, tmp_path / "all", batch_size=1))
    assert capfd.readouterr().err.splitlines() == [
        "nothing is held out to measure on: ?holdout=10% behind the dataset sets a part aside"
    ]
    lost = {odd.name for odd in ODD_IMAGES if odd.lost}
    files = open_files(str(tmp_path / "all"))
    problems = read_table(files, read_manifest(files), PROBLEMS).to_pylist()
    assert {row["where"]: row["kind"] for row in problems} == {
        "folder.jpg": "unreadable-file",
        "loop.jpg": "unreadable-file",
        "dangling.jpg": "missing-file",
        "pipe.jpg": "unreadable-file",
        "socket.jpg": "unreadable-file",
        "device.jpg": "unreadable-file",
        "unlisted.jpg": "no-caption",
    }
    assert next(row["detail"] for row in problems if row["where"] == "device.jpg").endswith(
        "device.jpg is a device, not a file; it is not opened"
    )
    reader = EmbeddingReader(str(tmp_path / "all"))
    reasons = {row.sample_id: row.detail for row in reader.quarantined}
    assert set(reasons) == lost
    assert all(odd.lost in reasons[odd.name] for odd in ODD_IMAGES if odd.lost)
    info = describe_cache(str(tmp_path / "all"))
    assert info.images_encoded is not None
    assert info.images_quarantined == len(lost) == result.quarantined
    assert info.lost_images == 7
    assert info.images_encoded + info.images_quarantined + info.lost_images == len(names) + 1
    assert sum(result.problems.values()) == len(lost) + 7
    assert verify_cache(str(tmp_path / "all")).ok

    # the good ones alone: the same rows
    for name in (*lost, *no_files, "unlisted.jpg"):
        (images / name).rmdir() if name == "folder.jpg" else (images / name).unlink()
    good = [odd.name for odd in ODD_IMAGES if not odd.lost]
    (photos / "captions.txt").write_text("image,caption\n" + "".join(f"{name},A caption.\n" for name in good))
    assert precompute(make_config(photos, tiny_teacher, tmp_path / "good", batch_size=1)).problems == {}
    alone = EmbeddingReader(str(tmp_path / "good"))
    ids = reader.samples["sample_id"].to_pylist()
    rows = np.array([ids.index(name) for name in alone.samples["sample_id"].to_pylist()])
    everything = np.arange(len(good))
    for array in ("embedding", "norm", "view"):
        assert np.array_equal(
            reader.take("image", rows, array=array), alone.take("image", everything, array=array), equal_nan=True
        )
    # and a student is shown what the teacher saw
    student = StudentImages(alone, ImageSource(str(photos)), CLIP)
    for image in sample_records(alone.samples):
        assert torch.equal(student.see(image), CLIP.transform(decode_image((images / image.sample_id).read_bytes())))


def test_two_runs_give_an_undecodable_image_the_same_words(tmp_path: Path) -> None:
    """Pillow's message names an address in memory; commits are compared byte for byte."""
    texts = set()
    for _ in range(3):
        keep = [io.BytesIO(bytes(1000)) for _ in range(len(texts) * 7)]
        with pytest.raises(UndecodableImageError) as caught:
            decode_image(b"not an image")
        texts.add(str(caught.value))
        del keep
    assert texts == {f"not an image, damaged at its start, or none of {', '.join(FORMATS)}; 12 bytes"}


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every file")
def test_a_file_that_may_not_be_read_is_a_problem(tmp_path: Path) -> None:
    for name in ("a.jpg", "b.jpg"):
        (tmp_path / name).write_bytes(ODD_IMAGES[-1].data)
    (tmp_path / "b.jpg").chmod(0)
    (tmp_path / "t.csv").write_text("path,caption\na.jpg,A.\nb.jpg,B.\n")
    found = load(f"table:{tmp_path}/t.csv")
    assert told(found.problems) == [("unreadable-file", "b.jpg", True)]


def test_a_file_too_large_for_an_image_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.jpg").write_bytes(ODD_IMAGES[-1].data)
    with (tmp_path / "huge.jpg").open("wb") as file:
        file.truncate(100 * 1024**3)  # a hole, no disk
    (tmp_path / "t.csv").write_text("path,caption\na.jpg,A.\nhuge.jpg,B.\n")
    found = load(f"table:{tmp_path}/t.csv")
    assert told(found.problems) == [("unreadable-file", "huge.jpg", True)]
    assert found.problems[0].detail.endswith("huge.jpg: 107,374,182,400 bytes; an image may have 536,870,912")
    monkeypatch.setattr(samples, "MAX_IMAGE_BYTES", 4)
    with pytest.raises(OSError, match="an image may have 4"):
        ImageSource(str(tmp_path)).read("a.jpg", 0, 5)
