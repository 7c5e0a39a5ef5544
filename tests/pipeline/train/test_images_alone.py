"""Students of images without captions: the image tower learns, the text tower stays as it was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from teacher_cache.pipeline.models.run_folder import RunFolder
from teacher_cache.pipeline.models.student import build_student, student_config
from teacher_cache.pipeline.precompute.run import precompute
from teacher_cache.pipeline.settings.precompute import PrecomputeConfig
from teacher_cache.pipeline.settings.train import TrainConfig
from teacher_cache.pipeline.train.loop import train
from teacher_cache.pipeline.train.losses import LOSSES, LossInputs
from teacher_cache.storage.check.verify import verify_cache
from teacher_cache.storage.errors import UsageError
from tests.conftest import write_photos
from tests.pipeline.train.train_work import make_cache, make_student, measure, trace, train_config


@pytest.fixture
def cache(tiny_teacher: Path, tmp_path: Path) -> Path:
    """16 pictures, a quarter of them with a caption beside it if ``captioned`` is called."""
    photos = write_photos(tmp_path / "photos", 24) / "images"
    return make_images(photos, tiny_teacher, tmp_path / "images.cache")


def make_images(photos: Path, teacher: Path, cache: Path, holdout: str = "?holdout=25%") -> Path:
    settings: dict[str, Any] = {"batch_size": 8, "chunk_rows": 8, "device": "cpu"}
    dataset = f"images:{photos}{holdout}"
    precompute(PrecomputeConfig(dataset=dataset, teacher=f"local-dir:{teacher}", cache=str(cache), **settings))
    return cache


@pytest.fixture
def student(tmp_path: Path) -> Path:
    return make_student(tmp_path / "student.json")


def test_losses_of_images_alone_by_hand() -> None:
    rows = torch.tensor([[1.0, 0.0], [0.6, 0.8]])
    taught = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    batch = LossInputs((rows,), (rows,), (taught,), torch.tensor(1.0), 1.0)  # type: ignore[arg-type]
    assert LOSSES["cosine"](batch).item() == pytest.approx(0.2, abs=1e-7)  # (0 + 0.4) / 2
    assert LOSSES["feature"](batch).item() == pytest.approx(0.2, abs=1e-7)  # (0.4^2 + 0.8^2) / 4


def test_a_cache_without_splits_is_learned_from_whole(tiny_teacher: Path, student: Path, tmp_path: Path) -> None:
    photos = write_photos(tmp_path / "photos", 8) / "images"
    cache = make_images(photos, tiny_teacher, tmp_path / "images.cache", holdout="")
    config = train_config(cache, student, tmp_path / "run", epochs=1, batch_size=256)
    assert train(config).record.config.split == ""


def test_the_image_tower_learns_and_the_text_tower_stays(
    cache: Path, student: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert verify_cache(str(cache)).ok
    config = train_config(cache, student, tmp_path / "run", epochs=6)
    record = train(config).record
    assert (record.config.captions_per_image, record.config.losses) == (0, {"cosine": 8.0})
    assert "has no captions: the student learns from its images alone, with cosine = 8; its text" in caplog.text
    steps = trace(tmp_path / "run")
    assert steps[-1]["loss"] < 0.8 * steps[0]["loss"]
    torch.manual_seed(0)
    begun = build_student(student_config(str(student)), {}, 16).model.state_dict()
    ended = load_file(tmp_path / "run" / str(record.checkpoint) / "open_clip_model.safetensors")
    changed = {name for name, value in ended.items() if not torch.equal(value, begun[name])}
    assert changed
    assert {name for name in changed if not name.startswith("visual.")} == set()
    assert train(config, resume=True).record == RunFolder(tmp_path / "run").read()


@pytest.mark.parametrize("changes", [{"micro_batch": 3}, {"devices": 2}])
def test_parts_and_devices_change_nothing(cache: Path, student: Path, tmp_path: Path, changes: dict[str, int]) -> None:
    train(train_config(cache, student, tmp_path / "whole", epochs=1))
    train(train_config(cache, student, tmp_path / "parts", epochs=1, **changes))
    losses = [[step["loss"] for step in trace(tmp_path / name)] for name in ("whole", "parts")]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"losses": {"cosine": 1.0, "relational": 1.0}},
            "losses relational compare images with captions, and this run",
        ),
        ({"recipe": "mobileclip"}, "recipe mobileclip has no loss for images alone; set losses of cosine and feature"),
        ({"select_split": "test"}, "select_split is measured by recall, which needs captions; leave it out"),
    ],
)
def test_what_needs_captions_is_refused_by_name(
    cache: Path, student: Path, tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    with pytest.raises(UsageError, match=rf"images\.cache has no captions: .*{said}"):
        train(train_config(cache, student, tmp_path / "run", **changes))
    with pytest.raises(ValueError, match=said):
        TrainConfig(cache="c", student="s", out="o", captions_per_image=0, **changes)


def test_recall_is_not_measured_without_captions(cache: Path, student: Path, tmp_path: Path) -> None:
    train(train_config(cache, student, tmp_path / "run", epochs=1))
    with pytest.raises(UsageError, match=r"of \d images have no caption\. Recall cannot be measured without: name a"):
        measure(tmp_path / "run")


def test_some_images_without_captions(tiny_teacher: Path, student: Path, tmp_path: Path) -> None:
    photos = write_photos(tmp_path / "photos", 24) / "images"
    for path in sorted(photos.iterdir())[:5]:
        path.with_suffix(".txt").write_text("A picture.")
    cache = make_images(photos, tiny_teacher, tmp_path / "images.cache")
    with pytest.raises(UsageError, match=r"\d+ of \d+ images have no caption\. To learn from the images alone: --set"):
        train(train_config(cache, student, tmp_path / "run"))
    record = train(train_config(cache, student, tmp_path / "run", captions_per_image=0, epochs=1)).record
    assert record.config.losses == {"cosine": 8.0}


def test_captions_may_be_left_alone(tiny_teacher: Path, student: Path, tmp_path: Path) -> None:
    cache = make_cache(tmp_path / "captioned", tiny_teacher, images=20)
    train(train_config(cache, student, tmp_path / "run", captions_per_image=0, epochs=1, losses={"feature": 100.0}))
    assert {"feature", "cosine"} & set(trace(tmp_path / "run")[0]) == {"feature"}
    assert measure(tmp_path / "run").images == 4
