"""Pixels of a cache's images for a model's input, decoded by the cache's decoder. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager

import numpy as np
from numpy.typing import NDArray

from teacher_cache.pipeline.data.batches.cached_samples import SampleRecord
from teacher_cache.pipeline.data.batches.stored_images import StoredImages
from teacher_cache.pipeline.data.datasets.samples import ImageSource
from teacher_cache.pipeline.data.images.decode import UndecodableImageError
from teacher_cache.pipeline.data.images.decoders import modules_of, open_image
from teacher_cache.pipeline.data.images.model_input import ModelInput
from teacher_cache.pipeline.data.images.views import Crop, crop_shown


class DecodedImages:
    """Pixels of images by their records. Thread-safe; holds no table.

    Args:
        source: source of the image bytes.
        seen: the model's preprocessing.
        decoder: name of the cache's decoder.

    Raises on access:
        OSError: the image cannot be read or decoded.
        CacheMismatchError: the image has changed since the teacher saw it.
    """

    def __init__(self, source: ImageSource, seen: ModelInput, decoder: str) -> None:
        self._source, self._seen, self._decoder = source, seen, decoder
        self._images = StoredImages(source)

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the pixels."""
        return self._seen.size

    @property
    def modules(self) -> tuple[str, ...]:
        """Modules that decoding takes and that are slow to import."""
        return modules_of(self._decoder)

    def named(self, image: SampleRecord) -> str:
        """Return the image's name for messages."""
        return self._images.named(image)

    def ahead(self, images: Sequence[SampleRecord]) -> AbstractContextManager[None]:
        """Prefetch images, see :meth:`teacher_cache.pipeline.data.batches.stored_images.StoredImages.ahead`."""
        return self._images.ahead(images)

    def write(self, image: SampleRecord, crop: Crop | None, row: NDArray[np.uint8]) -> None:
        """Write a crop to a row, RGB uint8 (height, width, 3) of the model's size. None: the evaluation crop."""
        row[:] = self.shown(image, crop)

    def shown(self, image: SampleRecord, crop: Crop | None) -> NDArray[np.uint8]:
        """Return a crop before normalising: RGB uint8 (height, width, 3). None: the evaluation crop."""
        return self.each_shown(image, [crop])[0]

    def each_shown(self, image: SampleRecord, crops: Sequence[Crop | None]) -> list[NDArray[np.uint8]]:
        """Return :meth:`shown` of several crops, decoding the image once."""
        data = self._images.read(image)
        try:
            decoded = open_image(data, self._decoder)
            return [
                self._seen.shown(decoded) if crop is None else crop_shown(decoded, crop, self._seen) for crop in crops
            ]
        except (UndecodableImageError, ArithmeticError, ValueError, RuntimeError) as error:
            raise OSError(f"{self.named(image)} cannot be decoded here, though the teacher saw it: {error}") from error
