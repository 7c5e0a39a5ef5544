"""Settings of deploy and student push: which student is shipped, which gates it must pass, and where it goes."""

from __future__ import annotations

import re

from pydantic import Field, field_validator, model_validator

from teacher_cache.pipeline.settings.base import Checkpoint, ImageRoot, MeasuredSplit, Pretrained, Rounds, StageConfig


class DeployConfig(StageConfig):
    """Ship a run's student: ONNX, int8, open_clip weights, tokenizer, and one table of measurements."""

    run: str = Field(description="Folder of the training run whose student is shipped.")
    out: str = Field(description="New folder to write.")
    checkpoint: Checkpoint = "last"
    cache: str | None = Field(None, description="Finished cache to measure on. Default: the run's.")
    split: MeasuredSplit = None
    image_root: ImageRoot = None
    teacher: str | None = Field(
        None, description="Teacher, as for precompute. Default: the name recorded in the cache."
    )
    pretrained: Pretrained = None
    zero_shot: str | None = Field(None, description="Dataset to classify, as for zero-shot: imagefolder:PATH.")
    prompts: str | None = Field(None, description="Prompt set for that dataset, as for zero-shot.")
    int8: bool = Field(True, description="Make int8 files too.")
    web: bool = Field(False, description="Write web/ too: the student as transformers.js and Optimum read it.")
    openvino: bool = Field(False, description="Write openvino/ too: the towers as OpenVINO's IR, in float32.")
    calibration_images: int = Field(
        512, gt=0, description="Number of training images that calibrate the int8 activations."
    )
    max_recall_loss: float = Field(
        1.0,
        ge=0,
        description="Maximum loss of int8 against fp32, in points of any R@K; one query may always be lost, unless it "
        "is 0. Above it nothing is shipped.",
    )
    rounds: Rounds = 15
    threads: int | None = Field(
        None, gt=0, description="Number of threads of each model while it is measured. Default: torch's choice."
    )

    @model_validator(mode="after")
    def _check_prompts_have_a_dataset(self) -> DeployConfig:
        if self.prompts and not self.zero_shot:
            raise ValueError("prompts are for a dataset to classify: set zero_shot, or leave prompts out")
        return self


class PushConfig(StageConfig):
    """Upload a run's student to Hugging Face's hub, in open_clip's form."""

    run: str = Field(description="Folder of the training run whose student is uploaded.")
    to: str = Field(description="Repository on the hub, ORG/NAME. A new one is created.")
    checkpoint: Checkpoint = "last"
    deployed: str | None = Field(
        None, description="Folder that deploy made of this run: its ONNX files, table and model card are uploaded too."
    )
    private: bool = Field(False, description="Create the repository as a private one.")

    @field_validator("to")
    @classmethod
    def _check_repository(cls, to: str) -> str:
        if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", to, re.ASCII):
            raise ValueError(f"{to!r} is no repository of the hub: write ORG/NAME, with your user name or organization")
        return to
