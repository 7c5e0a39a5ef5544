"""A running teacher as the source of targets: what training from a cache has to equal."""

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


class LiveTeacherSource:
    """A ``TeacherSource`` that encodes each batch's images and captions, with the crops that the cache stores.

    The cache gives the image, caption and crop of each row; no embedding is read. Targets are float32.
    """

    def __init__(self, teacher: LiveTeacher, reader: EmbeddingReader, source: ImageSource) -> None:
        self.logit_scale, self.logit_bias = teacher.logit_scale, teacher.identity().logit_bias
        self._teacher, self._reader = teacher, reader
        self._images, self._samples = StudentImages(reader, source, teacher.preprocess), CachedSamples(reader, 32)

    def targets(self, batches: Iterable[Pairs]) -> Generator[TeacherTargets]:
        for pairs in batches:
            crops = stored_crops(self._reader, pairs.image_rows, pairs.views)
            images = zip(self._samples.records(pairs.image_rows), crops, strict=True)
            pixels = torch.stack([self._images.see(image, crop) for image, crop in images])
            tokens = self._teacher.tokenizer(self._samples.texts(pairs.image_rows, pairs.caption_rows))
            texts = self._teacher.text_features(tokens).view(*pairs.caption_rows.shape, -1)
            yield TeacherTargets(self._teacher.image_features(pixels), texts)
