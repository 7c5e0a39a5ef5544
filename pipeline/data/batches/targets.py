"""Teacher's side of a batch: rows of a finished cache, or of another source."""

from __future__ import annotations

from collections.abc import Generator, Iterable
from contextlib import closing
from dataclasses import dataclass
from itertools import tee
from typing import Any, Protocol

import torch
from torch import Tensor

from teacher_cache.pipeline.data.batches.pairs import Pairs
from teacher_cache.storage.read.reader import EmbeddingReader


@dataclass(frozen=True)
class TeacherTargets:
    """Teacher's embeddings for one batch.

    Attributes:
        image: (batch, teacher_dim) float32, normalised.
        text: (batch, captions, teacher_dim) float32, normalised, in the order of each image's captions.
    """

    image: Tensor
    text: Tensor


class TeacherSource(Protocol):
    """Source of targets: the cache, or a running teacher."""

    logit_scale: float
    logit_bias: float | None

    def targets(self, batches: Iterable[Pairs], /) -> Generator[TeacherTargets]:
        """Yield the targets of each batch, in order, for its views and captions."""


class CachedTeacher:
    """Targets from a finished cache. No model is built or imported."""

    def __init__(self, reader: EmbeddingReader) -> None:
        self._reader = reader
        teacher = reader.manifest.identity.teacher
        self.logit_scale, self.logit_bias = teacher.logit_scale, teacher.logit_bias

    def targets(self, batches: Iterable[Pairs]) -> Generator[TeacherTargets]:
        """Yield the targets of each batch, in order. Threads prefetch chunks and end with the generator.

        Batches are taken thousands of rows before their targets are yielded.

        Raises:
            CacheError: as ``EmbeddingReader.stream``.
        """
        for_images, for_texts = tee(batches)
        images: Any = self._reader.stream("image", ((pairs.image_rows, pairs.views) for pairs in for_images))
        texts: Any = self._reader.stream("text", (pairs.caption_rows.ravel() for pairs in for_texts))
        with closing(images), closing(texts):
            for image, text in zip(images, texts, strict=True):
                captions = torch.from_numpy(text).float().view(len(image), len(text) // len(image), text.shape[1])
                yield TeacherTargets(torch.from_numpy(image).float(), captions)
