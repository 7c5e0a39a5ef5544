"""Teacher's side of a batch: rows of a finished cache, of several joined ones, or of another source."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from functools import partial
from itertools import tee
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from teacher_cache.pipeline.data.batches.pairs import Pairs
from teacher_cache.storage.read.reader import EmbeddingReader
from teacher_cache.storage.read.several.joined_caches import JoinedCache


@dataclass(frozen=True)
class TeacherTargets:
    """Teacher's embeddings for one batch.

    Attributes:
        image: (batch, teacher_dim) float32 or float16, normalised; of several teachers side by side, each normalised.
        text: (batch, captions, teacher_dim), the same, in the order of each image's captions.
    """

    image: Tensor
    text: Tensor


class TargetSource(Protocol):
    """Source of targets."""

    def targets(self, batches: Iterable[Pairs], /) -> Generator[TeacherTargets]:
        """Yield the targets of each batch, in order, for its views and captions."""


class TeacherSource(TargetSource, Protocol):
    """Source of one teacher's targets: the cache, or a running teacher."""

    logit_scale: float
    logit_bias: float | None


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


class JoinedTeachers:
    """Targets of several teachers for batches of the first one's cache, side by side in the order of the teachers.

    Args:
        sources: the first teacher's source, then one for each of ``joined``, for rows of its own cache.
    """

    def __init__(self, sources: Sequence[TargetSource], joined: Sequence[JoinedCache]) -> None:
        self._sources, self._joined = sources, joined

    def targets(self, batches: Iterable[Pairs]) -> Generator[TeacherTargets]:
        """Yield the targets of each batch, in order; see :class:`CachedTeacher`."""
        first, *others = tee(batches, len(self._sources))
        shares = [
            first,
            *(map(partial(_rows_in, cache), pairs) for cache, pairs in zip(self._joined, others, strict=True)),
        ]
        with ExitStack() as open_sources:
            streams = [
                open_sources.enter_context(closing(source.targets(share)))
                for source, share in zip(self._sources, shares, strict=True)
            ]
            for by_teacher in zip(*streams, strict=True):
                yield TeacherTargets(
                    *(_side_by_side([getattr(targets, tower) for targets in by_teacher]) for tower in ("image", "text"))
                )


def _rows_in(cache: JoinedCache, pairs: Pairs) -> Pairs:
    """Return the rows in another cache of a batch of the first one, which must all be there."""
    images, captions = cache.images[pairs.image_rows], cache.captions[pairs.caption_rows]
    return Pairs(images.astype(np.int64), captions.astype(np.int64), pairs.views)


def _side_by_side(rows: list[Tensor]) -> Tensor:
    wide = torch.cat(rows, dim=-1)
    return wide.pin_memory() if rows[0].is_pinned() else wide
