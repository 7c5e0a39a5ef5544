"""Base class of the settings, and fields shared by several stages."""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator


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


class CachesConfig(StageConfig):
    """Settings of a stage that takes the caches of several teachers, ``cache`` the first of them."""

    other_caches: tuple[str, ...] = Field(
        (), description="Caches of further teachers over the same images and captions, each named by --cache too."
    )

    @model_validator(mode="before")
    @classmethod
    def _split_caches(cls, settings: Any) -> Any:
        """Take ``cache = [A, B]`` of a run file or command line for ``cache`` A and ``other_caches`` B."""
        caches = settings.get("cache") if isinstance(settings, dict) else None
        if not isinstance(caches, (list, tuple)) or not caches:
            return settings
        if len(caches) > 1 and settings.get("other_caches"):
            raise ValueError("other_caches is set, and cache names several: set one of the two")
        return settings | {"cache": caches[0]} | ({"other_caches": caches[1:]} if len(caches) > 1 else {})

    @model_validator(mode="after")
    def _check_caches_differ(self) -> Self:
        caches = [getattr(self, "cache", None), *self.other_caches]
        if twice := next((cache for cache in caches if caches.count(cache) > 1), None):
            raise ValueError(f"cache {twice} is named twice: name the cache of another teacher")
        return self


def learned_split(config: Any, splits: Collection[str]) -> str:
    """Return the setting ``split`` of type :data:`LearnedSplit`: the only one of ``splits`` if it is not set."""
    return str(next(iter(splits)) if len(splits) == 1 and "split" not in config.model_fields_set else config.split)
