"""A small dataset that changes, and settings of its retraining."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from teacher_cache.pipeline.settings.promote import RetrainConfig
from tests.conftest import TINY_MODEL, write_photos


def make_home(place: Path) -> Path:
    """64 photographs and a student's model config."""
    write_photos(place / "photos", 64)
    (place / "student.json").write_text(json.dumps({**TINY_MODEL, "embed_dim": 12}))
    return place


def settings(place: Path, tiny_teacher: Path, **more: Any) -> RetrainConfig:
    return RetrainConfig(
        **{
            "dataset": f"flickr:{place / 'photos'}",
            "teacher": f"local-dir:{tiny_teacher}",
            "home": str(place / "home"),
            "student": str(place / "student.json"),
            "train": {"epochs": 1, "batch_size": 16, "workers": 0},
            "split": "train",
            "margin": 99.0,
            "ship": False,
            "device": "cpu",
            **more,
        }
    )


def add_photos(home: Path, first: int, count: int, split: str = "train") -> None:
    """To a split; rows of the training split are before those of the test split."""
    more = write_photos(home / f"more-{first}", count, first=first)
    with (
        (home / "photos" / "captions.txt").open("a") as captions,
        (home / "photos" / f"{split}.txt").open("a") as list_,
    ):
        captions.writelines(line + "\n" for line in (more / "captions.txt").read_text().splitlines()[1:])
        for image in sorted((more / "images").iterdir()):
            shutil.copy(image, home / "photos" / "images" / image.name)
            list_.write(image.name + "\n")
