"""A student that learns from smaller images than those that it is measured and shipped for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from teacher_cache.pipeline.models.run_folder import RunFolder
from teacher_cache.pipeline.models.student import Student, load_student
from teacher_cache.pipeline.settings.train import PixelsConfig, TrainConfig
from teacher_cache.pipeline.train.loop import train
from teacher_cache.pipeline.train.make_pixels import make_pixels, plan_pixels
from teacher_cache.storage.errors import CacheMismatchError, UsageError
from tests.pipeline.models.test_locked_layers import begin
from tests.pipeline.models.towers import KINDS, build
from tests.pipeline.train.train_work import make_student, measure, trace, train_config

OWN, SMALLER = 32, 24


@pytest.fixture
def config(photo_cache: Path, tmp_path: Path) -> Callable[..., TrainConfig]:
    """Makes settings of a convolutional student at 32 pixels; 24 to learn from."""
    settings = {"train_image_size": SMALLER, "select_split": "test", **begin(tmp_path)}
    return lambda name, **changes: train_config(photo_cache, out=tmp_path / name, **{**settings, **changes})


def test_it_learns_from_smaller_images_and_is_measured_at_its_own(
    config: Callable[..., TrainConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: set[tuple[bool, int, int]] = set()
    encode = Student.encode_image

    def watched(self: Student, pixels: torch.Tensor) -> torch.Tensor:
        if len(pixels) > 1:  # one image is tried at the start
            seen.add((self.training, pixels.shape[2], pixels.shape[3]))
        return encode(self, pixels)

    monkeypatch.setattr(Student, "encode_image", watched)
    record = train(config("run")).record
    assert seen == {(True, SMALLER, SMALLER), (False, OWN, OWN)}
    assert record.config.train_image_size == SMALLER
    shipped, architecture = load_student(RunFolder(tmp_path / "run").checkpoint_path())
    assert shipped.preprocess.size == (OWN, OWN)
    assert architecture["vision_cfg"]["image_size"] == OWN
    measured = measure(tmp_path / "run")
    last = record.epochs[-1].selection
    assert last is not None
    assert measured.student == last.recalls


def test_ready_pixels_of_that_size_give_the_same_run(config: Callable[..., TrainConfig], tmp_path: Path) -> None:
    ready = config("ready", pixels=str(tmp_path / "pixels"))
    made = PixelsConfig(cache=ready.cache, student=ready.student, out=str(ready.pixels), train_image_size=SMALLER)
    assert make_pixels(plan_pixels(made)).size == (SMALLER, SMALLER)
    train(config("decoded"))
    train(ready)
    assert trace(tmp_path / "ready") == trace(tmp_path / "decoded")
    with pytest.raises(CacheMismatchError, match=rf"size is \({SMALLER}, {SMALLER}\), wanted \({OWN}, {OWN}\)"):
        train(config("own", pixels=ready.pixels, train_image_size=None))


def test_a_transformer_is_refused_before_anything_is_written(photo_cache: Path, tmp_path: Path) -> None:
    student, cache, out = str(make_student(tmp_path / "vit.json")), str(photo_cache), tmp_path / "out"
    said = r"train_image_size 24: this student takes images of 32 x 32 pixels\. "
    with pytest.raises(UsageError, match=said):
        train(train_config(photo_cache, student, out, train_image_size=24))
    pixels = PixelsConfig(cache=cache, student=student, out=str(out), train_image_size=24)
    with pytest.raises(UsageError, match=said):
        plan_pixels(pixels)
    assert not out.exists()


def test_what_cannot_be_learned_from_is_refused_with_what_would_do() -> None:
    """open_clip's ResNet ends in an attention with positions; a map can be too small for the next kernel."""
    with pytest.raises(UsageError, match=r"open_clip's ResNets are, .*\(ModifiedResNet at 32 x 32: "):
        build(KINDS["resnet"]).preprocess_to_learn(32)
    lite0 = KINDS["lite0"]
    build(lite0).preprocess_to_learn(64)
    with pytest.raises(
        UsageError, match=r"train_image_size 65: this student's own images are 64 x 64, .*at least as large"
    ):
        build(lite0).preprocess_to_learn(65)
    wide = {**lite0, "vision_cfg": {**lite0["vision_cfg"], "image_size": [64, 32]}}
    with pytest.raises(UsageError, match=r"train_image_size 32: .* 64 x 32, and square ones"):
        build(wide).preprocess_to_learn(32)
