"""Labelled images for zero-shot classification."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipeline.datasets.base import Sample
from pipeline.decode import UndecodableImageError, decode_image
from pipeline.samples import ImageSource

__all__ = ["FileImages", "LabelledImages", "UnusableImageError"]

UnusableImageError = UndecodableImageError


class LabelledImages(Protocol):
    """Images, each of one class; several threads may ask for them at once."""

    @property
    def name(self) -> str:
        """As asked for, for messages."""

    @property
    def labels(self) -> NDArray[np.int64]:
        """(images,) the number of each image's class."""

    def sample_id(self, index: int) -> str:
        """What names an image for people."""

    def image(self, index: int) -> Image.Image:
        """One image, decoded.

        Raises:
            UnusableImageError: its bytes are no image; it is left out and named.
            OSError: it cannot be read.
        """


class FileImages:
    """Images in files, or in members of tars."""

    def __init__(self, name: str, samples: Sequence[Sample], root: str, labels: NDArray[np.int64]) -> None:
        self.name = name
        self.labels = labels
        self._samples = samples
        self._source = ImageSource(root)

    def sample_id(self, index: int) -> str:
        """That of the sample."""
        return self._samples[index].sample_id

    def image(self, index: int) -> Image.Image:
        """One image, decoded by the rules of ``pipeline.preprocess``."""
        sample = self._samples[index]
        return decode_image(self._source.read(sample.uri, sample.offset, sample.length))
