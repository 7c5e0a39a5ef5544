"""Settings of the comparison of teachers."""

from __future__ import annotations

from typing import Any

from pydantic import Field, field_validator, model_validator

from teacher_cache.pipeline.settings.base import Device, LearnedSplit, MeasuredSplit, StageConfig, StudentName
from teacher_cache.pipeline.settings.train import TrainConfig

_OWN = ("cache", "other_caches", "teacher_weights", "student", "out", "init", "split", "epochs", "seed", "device")


class CompareConfig(StageConfig):
    """Train a small student from each teacher's cache, and say which teacher to pay for."""

    caches: tuple[str, ...] = Field(
        description="Finished caches over the same images and captions, one of each teacher; a sample of the dataset "
        "is enough."
    )
    student: StudentName
    out: str = Field(
        description="Folder of the students and of comparison.json. What is finished in it is not done again."
    )
    init: tuple[str, ...] = Field(
        (),
        description="Checkpoint or folder of student inherit that all students start from; or one for each cache, "
        "where the teachers normalise images otherwise. None should know a teacher. Default: random.",
    )
    split: LearnedSplit = "train"
    measure_split: MeasuredSplit = None
    epochs: int = Field(10, gt=0, description="Number of passes over the split for each student.")
    seeds: int = Field(3, gt=0, description="Number of students of each teacher. With one, no difference is certain.")
    images: int | None = Field(
        None,
        gt=0,
        description="Number of images to encode in the end, for the cost. Default: of ?sample=5% twenty times the "
        "cache's, else the cache's.",
    )
    train: dict[str, Any] = Field(
        {}, description="Other settings of train by name: batch_size, learning_rate, train_image_size and others."
    )
    device: Device = "auto"

    @field_validator("caches")
    @classmethod
    def _check_several(cls, caches: tuple[str, ...]) -> tuple[str, ...]:
        if len(caches) < 2:
            raise ValueError("one cache has nothing to be compared with: name those of two teachers or more")
        return caches

    @model_validator(mode="after")
    def _check_train(self) -> CompareConfig:
        if len(self.init) > 1 and len(self.init) != len(self.caches):
            raise ValueError(f"{len(self.init)} init for {len(self.caches)} caches: give one, or one for each")
        if own := sorted(set(self.train) & set(_OWN)):
            raise ValueError(f"train.{own[0]}: the comparison sets it itself; leave it out")
        self.training(0, 0, self.out)
        return self

    def training(self, number: int, seed: int, out: str) -> TrainConfig:
        """Return the settings of one student.

        Args:
            number: number of its teacher's cache.
        """
        init = self.init[number if len(self.init) > 1 else 0] if self.init else None
        named = {"split": self.split} if "split" in self.model_fields_set else {}
        own = {"cache": self.caches[number], "student": self.student, "out": out, "init": init, "epochs": self.epochs}
        own |= {"seed": seed, "device": self.device}
        return TrainConfig.model_validate({"report_to": "none"} | self.train | named | own)
