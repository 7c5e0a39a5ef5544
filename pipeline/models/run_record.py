"""What ``run.json`` says of a training run, and which of its settings another run may change."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from teacher_cache.pipeline.settings.train import TrainConfig
from teacher_cache.storage.format.identity import CacheIdentity

__all__ = [
    "CHECKPOINT_CONFIG",
    "CHECKPOINT_WEIGHTS",
    "AveragedRun",
    "BestRecord",
    "EpochRecord",
    "ResizedRun",
    "RunRecord",
    "Selection",
    "checkpoint_image_size",
    "other_settings",
    "weights_file_sha256",
]

_ORIGIN = {"teacher", "identity", "accepted_mismatches", "cache_manifest_digest", "view", "config"}
# where things are and how often they are saved: a run that goes on may find these changed
_MAY_DIFFER = {"cache", "out", "image_root", "pixels", "device", "workers", "checkpoint_seconds", "checkpoint_steps"}

CHECKPOINT_WEIGHTS = "open_clip_model.safetensors"


CHECKPOINT_CONFIG = "open_clip_config.json"
"""A student's, in a checkpoint, by the names that open_clip gives them."""


class Selection(BaseModel, frozen=True):
    """A student measured on the select split, in percent."""

    split: str
    mean_recall: float = Field(description="Mean of the six recalls; the best epoch is the one with the highest.")
    recalls: dict[str, dict[str, float]]


class EpochRecord(BaseModel, frozen=True):
    """Means over one epoch."""

    epoch: int
    loss: float
    parts: dict[str, float] = Field(description="Each named loss before weighting.")
    seconds: float
    samples_per_second: float
    data_wait_share: float = Field(description="Share of the seconds in which the step waited for its batch.")
    selection: Selection | None = Field(None, description="The student behind this epoch on the select split.")


class BestRecord(BaseModel, frozen=True):
    """The best epoch, and by what it was chosen."""

    epoch: int
    split: str = Field(description="The split it was chosen on: what it scores there is no test result.")
    mean_recall: float
    checkpoint: str = Field(description="Its folder, relative to the run.")


class AveragedRun(BaseModel, frozen=True):
    """One of the runs whose mean a student is."""

    run: str = Field(description="Its folder, whole.")
    checkpoint: str = Field(description="Folder of its checkpoint, relative to the run.")
    weights_sha256: str = Field(description="Of the file of that checkpoint's weights.")
    config: TrainConfig
    chosen_on: str | None = Field(None, description="Split that the checkpoint was chosen on, for one that was.")


class ResizedRun(BaseModel, frozen=True):
    """The run whose student this is, at another image size."""

    run: str = Field(description="Its folder, whole.")
    checkpoint: str = Field(description="Folder of its checkpoint, relative to the run.")
    weights_sha256: str = Field(description="Of the file of that checkpoint's weights.")
    image_size: tuple[int, int] = Field(description="Height and width of what it saw there.")
    interpolated: tuple[str, ...] = Field(
        (), description="Weights that were interpolated, a transformer's positions; all others are the run's."
    )
    chosen_on: str | None = Field(None, description="Split that the checkpoint was chosen on, for one that was.")


class RunRecord(BaseModel):
    """``run.json``: what was trained on what, and how far it is.

    Of a mean of runs (``teacher_cache.pipeline.models.average``) ``config`` is the first one's, and steps and seconds
    are all of theirs.
    """

    model_config = ConfigDict(frozen=True)

    config: TrainConfig
    student_config: dict[str, Any] = Field(description="open_clip model config.")
    student_parameters: int
    teacher: str
    identity: CacheIdentity = Field(description="Of the cache, with the views that could be read.")
    accepted_mismatches: tuple[str, ...] = Field(
        (), description="Differences from the expected identity that the user accepted: field and both values."
    )
    cache_manifest_digest: str = Field(description="Of the very bytes that the student learned from.")
    view: str = Field(description="What the student saw of each image.")
    image_root: str
    train_images: int
    initial_weights_sha256: str | None = Field(
        None, description="Of the student before its first step, projections included; older versions name none."
    )
    averaged: tuple[AveragedRun, ...] = Field((), description="The runs whose mean this is; none of one that trained.")
    resized: ResizedRun | None = Field(None, description="Of a run that resize wrote: what it is of.")
    steps: int = Field(0, description="Taken up to the newest checkpoint.")
    seconds: float = Field(0.0, description="Of the finished epochs.")
    epochs: tuple[EpochRecord, ...] = Field((), description="The finished ones.")
    checkpoint: str | None = Field(None, description="Folder of the newest checkpoint, relative to the run.")
    best: BestRecord | None = Field(None, description="The best epoch on config.select_split.")
    resumed_at: tuple[int, ...] = Field((), description="Steps after which another process went on.")

    @property
    def finished(self) -> bool:
        """Whether all epochs are trained; a mean of runs has none of its own, and nothing to go on with."""
        return bool(self.averaged) or len(self.epochs) >= self.config.epochs

    def chosen_on(self, which: Literal["last", "best"]) -> str | None:
        """The split that a checkpoint was chosen on, where what it scores is no test result; None if on none."""
        if self.resized is not None:
            return self.resized.chosen_on
        if self.averaged:
            return next((each.chosen_on for each in self.averaged if each.chosen_on), None)
        return self.best.split if self.best is not None and which == "best" else None

    def origin(self) -> dict[str, Any]:
        """What a checkpoint says of itself when it is copied out of its run."""
        made_of = {name for name in ("averaged", "resized") if getattr(self, name)}
        return self.model_dump(mode="json", include=_ORIGIN | made_of)


def other_settings(asked: TrainConfig, recorded: TrainConfig) -> dict[str, tuple[Any, Any]]:
    """Settings by name that make another run of it, each as asked for and as recorded."""
    left, right = asked.model_dump(mode="json"), recorded.model_dump(mode="json")
    return {name: (left[name], right[name]) for name in right if name not in _MAY_DIFFER and left[name] != right[name]}


def checkpoint_image_size(checkpoint: Path) -> tuple[int, int]:
    """Height and width of the images that a checkpoint's student sees."""
    height, width = json.loads((checkpoint / CHECKPOINT_CONFIG).read_text())["preprocess_cfg"]["size"]
    return int(height), int(width)


def weights_file_sha256(checkpoint: Path) -> str:
    """Of the weights in a checkpoint's folder, as bytes of their file."""
    with (checkpoint / CHECKPOINT_WEIGHTS).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
