"""Images of a cache as model input."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from teacher_cache.pipeline.data.batches.cached_samples import SampleRecord
from teacher_cache.pipeline.data.batches.stored_images import StoredImages
from teacher_cache.pipeline.data.datasets.samples import ImageSource
from teacher_cache.pipeline.data.images.decode import UndecodableImageError
from teacher_cache.pipeline.data.images.decoders import open_image
from teacher_cache.pipeline.data.images.preprocess import Preprocess
from teacher_cache.pipeline.data.images.views import Crop, crop_shown
from teacher_cache.storage.read.reader import EmbeddingReader


class StudentImages:
    """Pixels of a cache's images, decoded by the cache's decoder. Holds no table; pickles without the reader.

    Args:
        source: source of the image bytes.
        preprocess: the model's preprocessing.

    Raises:
        UsageError: the decoder needs a package that is not installed.

    Raises on access:
        OSError: the image cannot be read or decoded.
        CacheMismatchError: the image has changed since the teacher saw it.
    """

    def __init__(self, reader: EmbeddingReader, source: ImageSource, preprocess: Preprocess) -> None:
        self._images = StoredImages(source)
        self.preprocess = preprocess.decoded_by(reader.manifest.identity.preprocess.decoder)

    def ahead(self, images: Sequence[SampleRecord]) -> AbstractContextManager[None]:
        """Prefetch images, see :meth:`teacher_cache.pipeline.data.batches.stored_images.StoredImages.ahead`."""
        return self._images.ahead(images)

    def see(self, image: SampleRecord, crop: Crop | None = None) -> Tensor:
        """Return a crop as float32 (3, height, width), at the model's own resolution. None: the evaluation crop."""
        return self.preprocess.normalized(self.shown(image, crop))

    def shown(self, image: SampleRecord, crop: Crop | None) -> NDArray[np.uint8]:
        """Return the pixels that :meth:`see` normalises: RGB uint8 (height, width, 3)."""
        return self.each_shown(image, [crop])[0]

    def each_shown(self, image: SampleRecord, crops: Sequence[Crop | None]) -> list[NDArray[np.uint8]]:
        """Return :meth:`shown` of several crops, decoding the image once."""
        data = self._images.read(image)
        try:
            decoded = open_image(data, self.preprocess.decoder)
            return [
                self.preprocess.shown(decoded) if crop is None else crop_shown(decoded, crop, self.preprocess)
                for crop in crops
            ]
        except (UndecodableImageError, ArithmeticError, ValueError, RuntimeError) as error:
            raise OSError(
                f"{self._images.named(image)} cannot be decoded here, though the teacher saw it: {error}"
            ) from error
