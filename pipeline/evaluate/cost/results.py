"""The results of a cost measurement."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from pydantic import BaseModel, Field

from teacher_cache.pipeline.evaluate.cost.latency import Ratio, Timing
from teacher_cache.pipeline.evaluate.cost.peak_memory import PeakMemory

__all__ = ["CostModel", "CostResult", "ModelCost", "ModelFacts", "SpeedRatios", "TowerFlops"]


class CostModel(Protocol):
    """A model that can be timed. Inputs are made and moved to the device before the timed call."""

    def images(self, batch: int) -> Callable[[], object]:
        """Return a call that embeds that many images."""
        ...

    def texts(self, batch: int) -> Callable[[], object]:
        """Return a call that embeds that many captions."""
        ...


class TowerFlops(BaseModel, frozen=True):
    """FLOPs (2 x multiply-adds) of one image and of one text."""

    image: int = Field(description="FLOPs of one image at the model's own size.")
    text: int = Field(description="FLOPs of one text at the full context length, as in published figures.")
    text_tokens: int = Field(description="Number of tokens of the full context.")
    caption: int = Field(description="FLOPs of a typical caption, without padding where the model allows that.")
    caption_tokens: int = Field(description="Number of tokens encoded for that caption.")


class ModelFacts(BaseModel, frozen=True):
    """Size and work of a model; None where it is not known or not measured."""

    parameters: int | None = None
    weights_bytes: int | None = Field(
        None,
        description="Size of the weights file in bytes: may be float16, with a factorised embedding multiplied out.",
    )
    state_bytes: int | None = Field(
        None, description="Size of parameters and buffers in memory in bytes; a factorised embedding as factors."
    )
    flops: TowerFlops | None = None


class ModelCost(BaseModel, frozen=True):
    """The cost of one model. Timings are by number of images, or captions, per call."""

    facts: ModelFacts
    images: dict[int, Timing]
    texts: dict[int, Timing]
    memory: PeakMemory | None


class SpeedRatios(BaseModel, frozen=True):
    """Speed as a multiple of the reference's, by number of images, or captions, per call."""

    images: dict[int, Ratio]
    texts: dict[int, Ratio]


class CostResult(BaseModel, frozen=True):
    """The cost of all models, in the order of the request."""

    models: dict[str, ModelCost]
    reference: str = Field(description="Model that the others are compared with.")
    speed: dict[str, SpeedRatios] = Field(description="Speed of each model but the reference.")
    memory_batch: int = Field(description="Number of images, then of captions, per call while memory was measured.")
    rounds: dict[int, int] = Field(description="Number of rounds, by number of images or captions per call.")
    device: str = Field("cpu", description="Name of the processor or GPU.")
    threads: int | None = Field(None, description="Number of torch's threads on a CPU, if known.")
    made_with: dict[str, str]
    run: str | None = None
    checkpoint: str | None = Field(None, description="Folder of the student's checkpoint in the run.")
    teacher_name: str | None = None
    seconds: float
