"""Teacher's side of a batch: rows of a finished cache, or of another source."""

from __future__ import annotations

from collections.abc import Generator, Iterable
from contextlib import closing
from dataclasses import dataclass
from itertools import tee
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from teacher_cache.pipeline.data.batches.pairs import Pairs
from teacher_cache.storage.read.reader import EmbeddingReader


@dataclass(frozen=True)
class TeacherTargets:
    """Teacher's embeddings for one batch.

    Attributes:
        image: (batch, teacher_dim) float32 or float16, normalised.
        text: (batch, captions, teacher_dim), normalised, in the order of each image's captions.
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
    """Targets from a finished cache. No model is built or imported.

    Args:
        pinned: give float16 in pinned memory, for a GPU to copy without a wait; else float32.
    """

    def __init__(self, reader: EmbeddingReader, pinned: bool = False) -> None:
        self._reader, self._pinned = reader, pinned
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
                shape = (len(image), len(text) // len(image), text.shape[1])
                yield TeacherTargets(self._tensor(image), self._tensor(text).view(shape))

    def _tensor(self, rows: NDArray[np.float16]) -> Tensor:
        tensor = torch.from_numpy(rows)
        return tensor.pin_memory() if self._pinned else tensor.float()
