"""A small cache to train from, and settings that take a second."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from teacher_cache.pipeline.evaluate.retrieval import EvaluateResult, evaluate
from teacher_cache.pipeline.precompute.run import precompute
from teacher_cache.pipeline.settings.evaluate import EvaluateConfig
from teacher_cache.pipeline.settings.precompute import PrecomputeConfig
from teacher_cache.pipeline.settings.train import TrainConfig
from teacher_cache.pipeline.train.loop import train
from tests.conftest import TINY_MODEL, write_photos


def make_cache(folder: Path, teacher: Path, images: int = 40, first: int = 0, **changes: Any) -> Path:
    """Photographs by the tiny teacher: four fifths of them to train on, the others to test on."""
    photos = write_photos(folder / "photos", images, first)
    settings: dict[str, Any] = {"batch_size": 8, "chunk_rows": 8, "device": "cpu", **changes}
    cache = str(folder / "photos.cache")
    precompute(PrecomputeConfig(dataset=f"flickr:{photos}", teacher=f"local-dir:{teacher}", cache=cache, **settings))
    return folder / "photos.cache"


def make_student(path: Path, embed_dim: int = 12, **vision: Any) -> Path:
    """A transformer without BatchNorm, of another width than the tiny teacher, which has 16.

    Args:
        vision: changes of its ``vision_cfg``.
    """
    vision_cfg = {**TINY_MODEL["vision_cfg"], **vision}
    path.write_text(json.dumps({**TINY_MODEL, "embed_dim": embed_dim, "vision_cfg": vision_cfg}))
    return path


def train_config(cache: Path, student: Path | str, out: Path, **changes: Any) -> TrainConfig:
    """Two epochs of four steps."""
    settings = {"epochs": 2, "batch_size": 8, "workers": 0, "device": "cpu", **changes}
    return TrainConfig(cache=str(cache), student=str(student), out=str(out), **settings)


def train_on_images(folder: Path, teacher: Path) -> Path:
    """Make a run that learned from the pictures of ``make_cache(folder)`` alone, and return its folder."""
    cache, pictures = folder / "loose.cache", next(folder.glob("photos/**/*.jpg")).parent
    settings: dict[str, Any] = {"batch_size": 8, "chunk_rows": 8, "device": "cpu", "max_problems": 1}
    precompute(
        PrecomputeConfig(dataset=f"images:{pictures}", teacher=f"local-dir:{teacher}", cache=str(cache), **settings)
    )
    out = folder / "loose-run"
    train(train_config(cache, make_student(folder / "loose.json"), out, captions_per_image=0))
    return out


def trace(run: Path) -> list[dict[str, Any]]:
    """The lines of a run's step log."""
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def measure(run: Path, **changes: Any) -> EvaluateResult:
    """``evaluate`` of a run on its test split."""
    settings = {"split": "test", "workers": 0, "device": "cpu", **changes}
    return evaluate(EvaluateConfig(run=str(run), **settings))
