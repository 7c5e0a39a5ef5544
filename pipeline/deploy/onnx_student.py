"""A deployed student as it is measured: by ONNX Runtime, each tower from its own file. No torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from teacher_cache.pipeline.data.images.decode import UndecodableImageError
from teacher_cache.pipeline.deploy.record import Deployment, Variant
from teacher_cache.pipeline.deploy.runtime import ImageLike, StudentRuntime
from teacher_cache.pipeline.deploy.tokens import runtime_package
from teacher_cache.pipeline.evaluate.cost.captions import captions

__all__ = ["OnnxStudent", "Tower", "load_onnx_student", "towers_of"]

Tower = Literal["image", "text"]

runtime_package("onnxruntime")  # now: a library's memory is not the model's


class OnnxStudent:
    """Embeds as ``teacher_cache.pipeline.evaluate.zero_shot.ZeroShotEncoder`` and is timed as
    ``teacher_cache.pipeline.evaluate.cost.results.CostModel``.

    Args:
        folder: of the deployment.
        variants: which file of each tower.
        threads: of a run; None for one a core.
    """

    def __init__(self, folder: Path, variants: Mapping[Tower, Variant], threads: int | None = None) -> None:
        self._towers = {tower: StudentRuntime(folder, variant, threads) for tower, variant in variants.items()}

    def embed_images(self, images: Sequence[ImageLike]) -> NDArray[np.float32]:
        """See :meth:`StudentRuntime.embed_images`."""
        try:
            return self._towers["image"].embed_images(images)
        except UndecodableImageError as error:  # too long a strip: what ZeroShotEncoder has a ValueError for
            raise ValueError(str(error)) from error

    def embed_texts(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """See :meth:`StudentRuntime.embed_texts`."""
        return self._towers["text"].embed_texts(texts)

    def images(self, batch: int) -> Callable[[], object]:
        """A call that embeds the same random pixels, in one run."""
        runtime = self._towers["image"]
        height, width = runtime.deployment.preprocess["size"]
        pixels = np.random.default_rng(0).standard_normal((batch, 3, height, width)).astype(np.float32)
        return lambda: runtime.embed_pixels(pixels)

    def texts(self, batch: int) -> Callable[[], object]:
        """A call that embeds that many of ``teacher_cache.pipeline.evaluate.cost.captions.CAPTIONS``, in one run."""
        runtime = self._towers["text"]
        tokens = runtime.tokens(captions(batch))
        return lambda: runtime.embed_tokens(tokens)


def towers_of(deployment: Deployment, variant: Variant) -> dict[Tower, Variant]:
    """The file of each tower in a variant; fp32 for a tower that has no int8 file."""
    made = deployment.towers.get(variant, {})
    return {tower: variant if tower in made else "fp32" for tower in deployment.towers["fp32"]}


def load_onnx_student(folder: str, variants: dict[Tower, Variant], threads: int | None = None) -> OnnxStudent:
    """For a process that measures memory; arguments as JSON has them."""
    return OnnxStudent(Path(folder), variants, threads)
