"""A running teacher as the source of targets: the baseline for a cache's speed and for its values."""

from __future__ import annotations

from collections.abc import Generator, Iterable

import torch

from teacher_cache.pipeline.data.batches.cached_samples import CachedSamples
from teacher_cache.pipeline.data.batches.pairs import Pairs, stored_crops
from teacher_cache.pipeline.data.batches.student_images import StudentImages
from teacher_cache.pipeline.data.batches.targets import TeacherTargets
from teacher_cache.pipeline.data.datasets.samples import ImageSource
from teacher_cache.pipeline.models.teacher import LiveTeacher
from teacher_cache.storage.read.reader import EmbeddingReader

__all__ = ["LiveTeacherSource"]


class LiveTeacherSource:
    """A teacher that encodes each batch's images and captions, with the crops that the cache stores.

    Implements :class:`teacher_cache.pipeline.data.batches.targets.TeacherSource`. The cache gives the image, caption
    and crop of each row; no embedding is read. Targets are float32; those of a cache are rounded to float16 or int8.
    """

    def __init__(
        self, teacher: LiveTeacher, reader: EmbeddingReader, source: ImageSource, window_chunks: int = 16
    ) -> None:
        """Check that the cache was made by this teacher.

        Args:
            window_chunks: number of chunks in a shuffle window of the pairs.

        Raises:
            CacheMismatchError: the cache was made by another teacher.
        """
        teacher.require(reader.manifest.identity, reader.location)
        self.logit_scale = teacher.logit_scale
        self._teacher, self._reader = teacher, reader
        self._images = StudentImages(reader, source, teacher.preprocess)
        self._samples = CachedSamples(reader, 2 * window_chunks)

    def targets(self, batches: Iterable[Pairs]) -> Generator[TeacherTargets]:
        """Yield the targets of each batch, in order.

        Raises:
            OSError, CacheMismatchError: an image cannot be read, or has changed.
            CacheError: the cache is damaged.
        """
        for pairs in batches:
            crops = stored_crops(self._reader, pairs.image_rows, pairs.views)
            images = zip(self._samples.records(pairs.image_rows), crops, strict=True)
            pixels = torch.stack([self._images.see(image, crop) for image, crop in images])
            tokens = self._teacher.tokenizer(self._samples.texts(pairs.image_rows, pairs.caption_rows))
            texts = self._teacher.text_features(tokens).view(*pairs.caption_rows.shape, -1)
            yield TeacherTargets(self._teacher.image_features(pixels), texts)
