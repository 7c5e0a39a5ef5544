"""Images of a cache as model input."""

from __future__ import annotations

from torch import Tensor

from teacher_cache.pipeline.data.batches.cached_samples import SampleRecord
from teacher_cache.pipeline.data.batches.decoded_images import DecodedImages
from teacher_cache.pipeline.data.datasets.samples import ImageSource
from teacher_cache.pipeline.data.images.preprocess import Preprocess
from teacher_cache.pipeline.data.images.views import Crop
from teacher_cache.storage.read.reader import EmbeddingReader


class StudentImages(DecodedImages):
    """Pixels of a cache's images, decoded by the cache's decoder. Holds no table; pickles without the reader.

    Args:
        source: source of the image bytes.
        preprocess: the model's preprocessing.

    Raises:
        UsageError: the decoder needs a package that is not installed.
    """

    def __init__(self, reader: EmbeddingReader, source: ImageSource, preprocess: Preprocess) -> None:
        self.preprocess = preprocess.decoded_by(reader.manifest.identity.preprocess.decoder)
        super().__init__(source, self.preprocess, self.preprocess.decoder)

    def see(self, image: SampleRecord, crop: Crop | None = None) -> Tensor:
        """Return a crop as float32 (3, height, width), at the model's own resolution. None: the evaluation crop."""
        return self.preprocess.normalized(self.shown(image, crop))

    def without_torch(self) -> DecodedImages:
        """Return the part that makes pixels, for processes that import no torch."""
        return DecodedImages(self._source, self.preprocess.without_torch(), self._decoder)
