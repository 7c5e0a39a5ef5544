"""A running teacher as the source of targets: what distillation costs without a cache, and what a cache must equal."""

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
    """A teacher that encodes each batch's images and captions, through the crops that the cache stores.

    The second implementation of :class:`teacher_cache.pipeline.data.batches.targets.TeacherSource`. The cache tells
    it which image, caption and crop a row is; no embedding is read. Targets are float32, where the cache rounded them
    to float16 or int8.
    """

    def __init__(
        self, teacher: LiveTeacher, reader: EmbeddingReader, source: ImageSource, window_chunks: int = 16
    ) -> None:
        """Take a teacher in the place of a cache.

        Args:
            window_chunks: chunks in a window of the shuffle that the pairs come from.

        Raises:
            CacheMismatchError: the cache is of another teacher.
        """
        teacher.require(reader.manifest.identity, reader.location)
        self.logit_scale = teacher.logit_scale
        self._teacher, self._reader = teacher, reader
        self._images = StudentImages(reader, source, teacher.preprocess)
        self._samples = CachedSamples(reader, 2 * window_chunks)

    def targets(self, batches: Iterable[Pairs]) -> Generator[TeacherTargets]:
        """Yield the targets of each batch, in order.

        Raises:
            OSError, CacheMismatchError: an image cannot be read or is another one.
            CacheError: the cache is damaged.
        """
        for pairs in batches:
            crops = stored_crops(self._reader, pairs.image_rows, pairs.views)
            images = zip(self._samples.records(pairs.image_rows), crops, strict=True)
            pixels = torch.stack([self._images.see(image, crop) for image, crop in images])
            tokens = self._teacher.tokenizer(self._samples.texts(pairs.image_rows, pairs.caption_rows))
            texts = self._teacher.text_features(tokens).view(*pairs.caption_rows.shape, -1)
            yield TeacherTargets(self._teacher.image_features(pixels), texts)
