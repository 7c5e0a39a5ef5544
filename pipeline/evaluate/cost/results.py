"""The results of a cost measurement."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from pydantic import BaseModel, Field

from teacher_cache.pipeline.evaluate.cost.latency import Ratio, Timing
from teacher_cache.pipeline.evaluate.cost.peak_memory import PeakMemory

__all__ = ["CostModel", "CostResult", "ModelCost", "ModelFacts", "SpeedRatios", "TowerFlops"]


class CostModel(Protocol):
    """A model that can be timed. Inputs are made and moved before the call, which is over when it returns."""

    def images(self, batch: int) -> Callable[[], object]:
        """Return a call that embeds that many images."""
        ...

    def texts(self, batch: int) -> Callable[[], object]:
        """Return a call that embeds that many captions."""
        ...


class TowerFlops(BaseModel, frozen=True):
    """FLOPs, 2 x multiply-adds, of one image and of one text
    (``teacher_cache.pipeline.evaluate.cost.torch_models``)."""

    image: int = Field(description="One image at the model's own size.")
    text: int = Field(description="One text at the full context, as published figures count.")
    text_tokens: int = Field(description="Tokens of the full context.")
    caption: int = Field(description="A usual caption as it is encoded: without padding, where that is sound.")
    caption_tokens: int = Field(description="Tokens that are encoded for that caption.")


class ModelFacts(BaseModel, frozen=True):
    """Size and work of a model; None where it is not known or not measured."""

    parameters: int | None = None
    weights_bytes: int | None = Field(
        None,
        description="Bytes of the weights on disk, as stored: perhaps float16, a factorised embedding multiplied out.",
    )
    state_bytes: int | None = Field(
        None, description="Bytes of parameters and buffers in memory; a factorised embedding as factors."
    )
    flops: TowerFlops | None = None


class ModelCost(BaseModel, frozen=True):
    """One model. Timings by images, or captions, per call."""

    facts: ModelFacts
    images: dict[int, Timing]
    texts: dict[int, Timing]
    memory: PeakMemory | None


class SpeedRatios(BaseModel, frozen=True):
    """Speed as a multiple of the reference's, by images, or captions, per call."""

    images: dict[int, Ratio]
    texts: dict[int, Ratio]


class CostResult(BaseModel, frozen=True):
    """Models in the order in which they were given."""

    models: dict[str, ModelCost]
    reference: str = Field(description="Model that the others are compared with.")
    speed: dict[str, SpeedRatios] = Field(description="Speed of each model but the reference.")
    memory_batch: int = Field(description="Images, then captions, per call while memory was measured.")
    rounds: dict[int, int] = Field(description="Rounds by images, or captions, per call.")
    device: str = Field("cpu", description="Name of the processor or GPU.")
    threads: int | None = Field(None, description="Number of torch's threads on a CPU, if known.")
    made_with: dict[str, str]
    run: str | None = None
    checkpoint: str | None = Field(None, description="Folder of the student's checkpoint in the run.")
    teacher_name: str | None = None
    seconds: float
