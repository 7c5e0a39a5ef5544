"""The models of a student's table behind one face, torch or ONNX Runtime: as recall, zero-shot and cost want them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipeline.cost_models import captions
from pipeline.decode import decode_image
from pipeline.deployment import Deployment, Variant
from pipeline.runtime import StudentRuntime

__all__ = ["Contender", "Encoder", "OnnxStudent", "bytes_to_rows"]

_Tower = Literal["image", "text"]


class Encoder(Protocol):
    """Images as decoded, and texts as they are, to unit rows, float32 (n, dim)."""

    def embed_images(self, images: Sequence[Image.Image]) -> NDArray[np.float32]:
        """Of images."""

    def embed_texts(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Of texts."""


class Contender(Protocol):
    """What ``pipeline.cost`` times: calls on inputs that are ready."""

    def images(self, batch: int) -> Callable[[], object]:
        """A call that embeds so many images."""

    def texts(self, batch: int) -> Callable[[], object]:
        """A call that embeds so many captions."""


class OnnxStudent:
    """A deployed folder by ONNX Runtime: an :class:`Encoder` and a :class:`Contender`.

    Args:
        folder: of the deployment.
        variants: which file of each tower.
        threads: of a run; None for one a core.
    """

    def __init__(self, folder: Path, variants: Mapping[_Tower, Variant], threads: int | None = None) -> None:
        self._towers = {tower: StudentRuntime(folder, variant, threads) for tower, variant in variants.items()}

    def embed_images(self, images: Sequence[Image.Image]) -> NDArray[np.float32]:
        """See :meth:`StudentRuntime.embed_images`."""
        return self._towers["image"].embed_images(images)

    def embed_texts(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """See :meth:`StudentRuntime.embed_texts`."""
        return self._towers["text"].embed_texts(texts)

    def images(self, batch: int) -> Callable[[], object]:
        """A call that embeds the same random pixels."""
        height, width = self._towers["image"].deployment.preprocess["size"]
        pixels = np.random.default_rng(0).standard_normal((batch, 3, height, width)).astype(np.float32)
        return lambda: self._towers["image"].embed_pixels(pixels)

    def texts(self, batch: int) -> Callable[[], object]:
        """A call that embeds that many of ``pipeline.cost_models.CAPTIONS``."""
        runtime = self._towers["text"]
        tokens = runtime.tokens(captions(batch))
        return lambda: runtime.embed_tokens(tokens)


def bytes_to_rows(encoder: Encoder) -> Callable[[list[bytes]], NDArray[np.float32]]:
    """The encoder for images as they are stored."""
    return lambda images: encoder.embed_images([decode_image(data) for data in images])


def towers_of(deployment: Deployment, variant: Variant) -> dict[_Tower, Variant]:
    """The file of each tower in a variant; fp32 for a tower that has no int8 file."""
    made: dict[_Tower, Any] = deployment.towers.get(variant, {})
    return {tower: variant if tower in made else "fp32" for tower in deployment.towers["fp32"]}
