"""Base class of the settings, and fields shared by several stages."""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field


def comma_separated(value: Any) -> Any:
    """Split a text at its commas (a list on the command line); return any other value unchanged."""
    return value.split(",") if isinstance(value, str) else value


def _check_device(name: str) -> str:
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", name):
        raise ValueError(f"device {name!r} is not known; use auto, cpu, cuda or cuda:N")
    return name


Decoder = Literal["pillow", "jpeg-scaled"]
Precision = Literal["fp32", "bf16", "pure_bf16", "fp16"]
StoredDtype = Literal["float16", "int8"]

AcceptMismatch = Annotated[
    tuple[str, ...],
    BeforeValidator(comma_separated),
    Field(description="Fields of the identity that may differ, for example dataset. Recorded in the result."),
]
Checkpoint = Annotated[
    Literal["last", "best"],
    Field(description="Checkpoint of the run: last, or best on the run's select_split."),
]
Device = Annotated[
    str,
    AfterValidator(_check_device),
    Field(description="Device: auto (a GPU if there is one), cpu, cuda or cuda:N. A missing device is an error."),
]
ImageRoot = Annotated[
    str | None,
    Field(description="Folder or URL of the images, if they moved. Default: the place recorded in the cache."),
]
LoaderWorkers = Annotated[
    int | None,
    Field(
        ge=0,
        description="Number of processes that decode images; 0: threads. Default: half the cores, at most 8; for a "
        "GPU all but one, at most 16.",
    ),
]
MeasuredSplit = Annotated[
    str | None, Field(description="Split to measure on. Default: test, else the only one that is held out.")
]
Pretrained = Annotated[
    str | None,
    Field(description="Pretrained tag or weights file of open_clip, for a built-in model name. Default: none."),
]
Rounds = Annotated[
    int,
    Field(gt=0, description="Number of timed calls of each model at each batch size. Batch size 1 gets four times."),
]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
StudentName = Annotated[
    str,
    Field(
        description="Student: a shipped preset, an open_clip model name, hf-hub:ORG/NAME, or the path of an open_clip "
        "config."
    ),
]
TeacherName = Annotated[
    str,
    Field(
        description="Teacher: an open_clip name, hf-hub:ORG/REPO, local-dir:PATH, transformers:PATH-OR-REPO or "
        "bundled:scenes."
    ),
]


LearnedSplit = Annotated[str, Field(description="Split to learn from. Default: train, or the cache's only one.")]


class StageConfig(BaseModel):
    """Settings of one stage: immutable, and unknown names are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")


def learned_split(config: Any, splits: Collection[str]) -> str:
    """Return the setting ``split`` of type :data:`LearnedSplit`: the only one of ``splits`` if it is not set."""
    return str(next(iter(splits)) if len(splits) == 1 and "split" not in config.model_fields_set else config.split)
