"""A student that learns from smaller images than those that it is measured and shipped for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from teacher_cache.pipeline.evaluate.retrieval import evaluate
from teacher_cache.pipeline.models.run_folder import RunFolder
from teacher_cache.pipeline.models.student import Student, build_student, load_student
from teacher_cache.pipeline.settings.evaluate import EvaluateConfig
from teacher_cache.pipeline.settings.train import PixelsConfig
from teacher_cache.pipeline.train.loop import StepProgress, train
from teacher_cache.pipeline.train.make_pixels import make_pixels, plan_pixels
from teacher_cache.storage.errors import CacheMismatchError, UsageError
from tests.pipeline.models.test_locked_layers import begin
from tests.pipeline.models.towers import KINDS, PREPROCESS
from tests.pipeline.train.train_work import make_cache, make_student, trace, train_config

OWN, SMALLER = 32, 24


@pytest.fixture(scope="module")
def home(tiny_teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("smaller")
    make_cache(folder, tiny_teacher)
    begin(folder)
    return folder


def config(home: Path, out: Path, **changes: Any) -> Any:
    """Of a convolutional student at 32 pixels; 24 to learn from."""
    start = home / "start"
    settings = {"train_image_size": SMALLER, "init": str(start), "select_split": "test", **changes}
    return train_config(home / "photos.cache", start / "open_clip_config.json", out, **settings)


def test_it_learns_from_smaller_images_and_is_measured_at_its_own(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: set[tuple[bool, int, int]] = set()
    encode = Student.encode_image

    def watched(self: Student, pixels: torch.Tensor) -> torch.Tensor:
        if len(pixels) > 1:  # one image is tried at the start
            seen.add((self.training, pixels.shape[2], pixels.shape[3]))
        return encode(self, pixels)

    monkeypatch.setattr(Student, "encode_image", watched)
    record = train(config(home, tmp_path / "run")).record
    assert seen == {(True, SMALLER, SMALLER), (False, OWN, OWN)}
    assert record.config.train_image_size == SMALLER
    shipped, architecture = load_student(RunFolder(tmp_path / "run").checkpoint_path())
    assert shipped.preprocess.size == (OWN, OWN)
    assert architecture["vision_cfg"]["image_size"] == OWN
    measured = evaluate(EvaluateConfig(run=str(tmp_path / "run"), split="test", workers=0, device="cpu"))
    last = record.epochs[-1].selection
    assert last is not None
    assert measured.student == last.recalls


def test_ready_pixels_of_that_size_give_the_same_run(home: Path, tmp_path: Path) -> None:
    cache, student = str(home / "photos.cache"), str(home / "start" / "open_clip_config.json")
    made = PixelsConfig(cache=cache, student=student, out=str(tmp_path / "pixels"), train_image_size=SMALLER)
    assert make_pixels(plan_pixels(made)).size == (SMALLER, SMALLER)
    train(config(home, tmp_path / "decoded"))
    train(config(home, tmp_path / "ready", pixels=str(tmp_path / "pixels")))
    assert trace(tmp_path / "ready") == trace(tmp_path / "decoded")
    with pytest.raises(CacheMismatchError, match=rf"size is \({SMALLER}, {SMALLER}\), wanted \({OWN}, {OWN}\)"):
        train(config(home, tmp_path / "own", pixels=str(tmp_path / "pixels"), train_image_size=None))


def test_another_size_is_another_run(home: Path, tmp_path: Path) -> None:
    losses = []
    for size in (SMALLER, None):
        train(config(home, tmp_path / str(size), train_image_size=size, epochs=1))
        losses.append(json.loads((tmp_path / str(size) / "log.jsonl").read_text().splitlines()[-1])["loss"])
    assert losses[0] != losses[1]


def test_it_goes_on_with_its_size_and_no_other(home: Path, tmp_path: Path) -> None:
    class Stopped(Exception):
        pass

    def stop(at: StepProgress) -> None:
        if at.step == 6:
            raise Stopped

    settings = {"checkpoint_steps": 3, "select_split": None}
    train(config(home, tmp_path / "whole", **settings))
    with pytest.raises(Stopped):
        train(config(home, tmp_path / "run", **settings), stop)
    with pytest.raises(UsageError, match="train_image_size"):
        train(config(home, tmp_path / "run", **{**settings, "train_image_size": None}), resume=True)
    train(config(home, tmp_path / "run", **settings), resume=True)
    assert trace(tmp_path / "run") == trace(tmp_path / "whole")


def test_a_transformer_is_refused_before_anything_is_written(home: Path, tmp_path: Path) -> None:
    student, cache, out = str(make_student(tmp_path / "vit.json")), str(home / "photos.cache"), tmp_path / "out"
    said = r"train_image_size 24: this student's .* cannot take images of 24 x 24 pixels, its own have 32 x 32: "
    with pytest.raises(UsageError, match=said):
        train(train_config(Path(cache), student, out, train_image_size=24))
    pixels = PixelsConfig(cache=cache, student=student, out=str(out), train_image_size=24)
    with pytest.raises(UsageError, match=said):
        plan_pixels(pixels)
    assert not out.exists()


def test_what_cannot_be_learned_from_is_refused_with_what_would_do() -> None:
    """open_clip's ResNet ends in an attention with positions; a map can be too small for the next kernel."""
    with pytest.raises(UsageError, match=r"ModifiedResNet cannot take images of 32 x 32 .*open_clip's ResNets"):
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


def build(architecture: dict[str, Any]) -> Student:
    return build_student(architecture, PREPROCESS, 16)
