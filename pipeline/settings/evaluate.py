"""Settings of the stages that measure: evaluate, zero-shot, cost."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import BeforeValidator, Field, field_validator

from teacher_cache.pipeline.settings.base import (
    AcceptMismatch,
    CachesConfig,
    Checkpoint,
    Device,
    ImageRoot,
    LoaderWorkers,
    MeasuredSplit,
    Pretrained,
    Rounds,
    StageConfig,
    comma_separated,
)
from teacher_cache.storage.errors import UsageError
from teacher_cache.storage.files.places import CACHE, kind_of


class EvaluateConfig(CachesConfig):
    """Measure the cached teacher, and the student of a run, on one split."""

    cache: str | None = Field(
        None,
        description="Folder or URL of a finished cache; again for other_caches. Default: the run's first.",
    )
    run: str | None = Field(None, description="Folder of a training run. Default: measure only the teacher.")
    checkpoint: Checkpoint = "last"
    split: MeasuredSplit = None
    caption_kind: str | None = Field(None, description="Kind of the captions to measure on. Default: all captions.")
    accept_mismatch: AcceptMismatch = ()
    image_root: ImageRoot = None
    ranks: str | None = Field(
        None, description="Parquet file to write with the rank of every query, by teacher and student."
    )
    towers: bool = Field(
        False, description="Measure each tower of the student separately too, against the teacher's other tower."
    )
    batch_size: int = Field(256, gt=0, description="Number of images or captions per forward pass of the student.")
    device: Device = "auto"
    workers: LoaderWorkers = None


class ZeroShotConfig(StageConfig):
    """Classify the images of a dataset by the prompts of their classes."""

    dataset: str = Field(
        description="Labelled images: imagefolder:PATH, webdataset:PATH (.cls beside each image), "
        "torchvision:NAME:PATH, or labelled:PATH, whose form is found out. With --all a folder of datasets."
    )
    all: bool = Field(
        False,
        description="Measure all 27 datasets of CLIP's table that have a folder, by the names of the prompt sets.",
    )
    prompts: str = Field(
        "", description="Prompt set with templates and class names: imagenet1k, cifar10, food101 and others."
    )
    templates: str = Field(
        "",
        description="Templates: photo, simple or openai (3, 7 and 80 templates), a prompt set, or a file with one "
        "template per line and {} for the class. Default: the prompt set's, else the dataset's, else photo.",
    )
    class_names: str = Field(
        "",
        description="JSON file with class names: an object {folder or label: name}, or a list. Default: the prompt "
        "set's, else the dataset's.",
    )
    split: str = Field(
        "", description="Published split to measure on, or all. Required where there are several splits."
    )
    cache: str | None = Field(
        None,
        description="Cache of the teacher's rows of these images and prompts. --teacher makes it if it is new. With "
        "--all a folder of caches.",
    )
    run: str | None = Field(None, description="Folder of a training run, to measure its student.")
    checkpoint: Checkpoint = "last"
    teacher: str | None = Field(None, description="Teacher to measure, as for precompute.")
    pretrained: Pretrained = None
    batch_size: int | None = Field(
        None, gt=0, description="Number of images or prompts per forward pass. Default: 16 on a CPU, 256 on a GPU."
    )
    device: Device = "auto"

    def require_model(self) -> None:
        """Check that a model is set.

        Raises:
            UsageError: none is.
        """
        if self.run is None and self.teacher is None and self.cache is None:
            raise UsageError(
                "nothing to measure: give --run, --teacher or both; or --cache, for the teacher that it is of"
            )

    def require_root(self) -> None:
        """Check that the settings suit all datasets.

        Raises:
            UsageError: the folder is missing, the cache is a single one, or a setting is one of a single dataset.
        """
        for name in ("prompts", "templates", "class_names", "split"):
            if getattr(self, name):
                option = name.replace("_", "-")
                raise UsageError(f"--{option} with --all: each dataset has its own; leave --{option} out")
        if not Path(self.dataset).is_dir():
            raise UsageError(f"--all {self.dataset}: no such folder; it holds a folder per dataset, such as cifar10")
        if self.cache is not None and kind_of(self.cache) == CACHE:
            raise UsageError(f"--cache {self.cache} is one cache; with --all name a folder, for a cache per dataset")


class CostConfig(StageConfig):
    """Measure what a student and its teacher cost to run."""

    run: str | None = Field(None, description="Folder of a training run, to measure its student.")
    checkpoint: Checkpoint = "last"
    teacher: str | None = Field(None, description="Teacher to measure, as for precompute.")
    pretrained: Pretrained = None
    batch: Annotated[tuple[int, ...], BeforeValidator(comma_separated)] = Field(
        (1, 32), min_length=1, description="Batch sizes of images and captions. Memory is measured at the largest."
    )
    rounds: Rounds = 15
    threads: int | None = Field(None, gt=0, description="Number of torch threads on a CPU. Default: torch's choice.")
    device: Device = "auto"

    @field_validator("batch")
    @classmethod
    def _check_positive(cls, batch: tuple[int, ...]) -> tuple[int, ...]:
        if min(batch) < 1:
            raise ValueError(f"batch sizes must be 1 or more, not {','.join(map(str, batch))}")
        return tuple(sorted(set(batch)))
