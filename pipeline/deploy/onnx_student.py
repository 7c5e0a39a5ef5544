"""A deployed student to measure: ONNX Runtime or OpenVINO runs each tower from its own file. No torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from teacher_cache.pipeline.deploy.record import Deployment, Variant
from teacher_cache.pipeline.deploy.runtime import StudentRuntime
from teacher_cache.pipeline.deploy.tokens import runtime_package
from teacher_cache.pipeline.evaluate.cost.results import captions

Tower = Literal["image", "text"]

runtime_package("onnxruntime")  # imported now: its memory does not count as the model's


class OnnxStudent:
    """A student that embeds as ``teacher_cache.pipeline.evaluate.zero_shot.measure.ZeroShotEncoder`` and is timed as
    ``teacher_cache.pipeline.evaluate.cost.results.CostModel``.

    Args:
        folder: folder of the deployment.
        variants: variant of each tower's file.
        threads: threads of a run. Default: one per core.
    """

    def __init__(self, folder: str | Path, variants: Mapping[Tower, Variant], threads: int | None = None) -> None:
        self._towers = {tower: StudentRuntime(folder, variant, threads) for tower, variant in variants.items()}
        self.prepare = self._towers["image"].pixels
        self.embed_texts = self._towers["text"].embed_texts

    def embed_images(self, prepared: Sequence[NDArray[np.float32]]) -> NDArray[np.float32]:
        """Embed prepared images."""
        return self._towers["image"].embed_pixels(np.stack(prepared))

    def images(self, batch: int) -> Callable[[], object]:
        """Return a call that embeds the same random pixels in one run."""
        runtime = self._towers["image"]
        height, width = runtime.deployment.preprocess["size"]
        pixels = np.random.default_rng(0).standard_normal((batch, 3, height, width)).astype(np.float32)
        return lambda: runtime.embed_pixels(pixels)

    def texts(self, batch: int) -> Callable[[], object]:
        """Return a call that embeds :func:`~teacher_cache.pipeline.evaluate.cost.results.captions` in one run."""
        runtime = self._towers["text"]
        tokens = runtime.tokens(captions(batch))
        return lambda: runtime.embed_tokens(tokens)


def towers_of(deployment: Deployment, variant: Variant) -> dict[Tower, Variant]:
    """Return the variant of each tower's file: fp32 for a tower without an int8 file."""
    made = deployment.towers.get(variant, {})
    return {tower: variant if tower in made else "fp32" for tower in deployment.towers["fp32"]}
