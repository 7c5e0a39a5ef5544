"""Models and captions to measure, and the results of a cost measurement. No torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from pydantic import BaseModel, Field

from teacher_cache.pipeline.evaluate.cost.latency import Ratio, Timing
from teacher_cache.pipeline.evaluate.cost.peak_memory import PeakMemory, ProbeRequest

CAPTIONS = (
    "a brown dog runs through the tall grass with a ball .",
    "two children play in the sand .",
    "a man in a red jacket rides his bicycle down a steep road .",
    "a woman sits on a bench and reads a newspaper .",
    "people wait for the bus .",
    "a football player in a white shirt kicks the ball past the goalkeeper while the crowd behind him cheers .",
    "a girl with a yellow umbrella walks along a wet street .",
    "three friends sit around a fire at night .",
    "a black and white cat sleeps on a blue chair .",
    "the boy jumps into the swimming pool from the side .",
    "a climber hangs from a rock high above the sea .",
    "a plate of fruit stands on a wooden table beside a glass of water .",
    "an old man feeds the birds in the park .",
    "a snowboarder jumps over a ramp .",
    "a group of tourists takes pictures of a tall church on a sunny day .",
    "a dog shakes off water on the beach .",
    "the woman in the green dress laughs .",
    "a worker with a yellow helmet climbs up a ladder beside a brick wall .",
    "horses stand in a field behind a fence .",
    "a baby holds a spoon and looks at the camera .",
    "two men play chess at a small table in front of a cafe .",
    "a surfer rides a big wave .",
    "a street musician plays the violin while a little girl and her mother stop to listen .",
    "a white boat lies in the harbour .",
    "cars drive over a bridge in the evening .",
    "a boy in a striped shirt throws a stick for his dog .",
    "a skier goes down a hill covered in fresh snow .",
    "a couple dances in a room full of people .",
    "the red train stops at an empty station .",
    "a man cooks fish on a grill in his garden .",
    "a young woman ties her running shoes on the steps of a stadium .",
    "a small bird sits on a branch .",
)
"""Captions as long as those of Flickr8k: 8 to 22 tokens, 13 on average; the first one has 14."""


def captions(count: int) -> list[str]:
    """Return the first ``count`` of ``CAPTIONS``, repeated if there are fewer."""
    return [CAPTIONS[number % len(CAPTIONS)] for number in range(count)]


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


@dataclass(frozen=True)
class MeasuredModel:
    """A model to measure.

    Attributes:
        timed: the model, loaded.
        probe: request to load it in a fresh process, where its peak memory is measured.
        facts: size and FLOPs, where known.
    """

    timed: CostModel
    probe: ProbeRequest | None = None
    facts: ModelFacts = field(default_factory=ModelFacts)


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
