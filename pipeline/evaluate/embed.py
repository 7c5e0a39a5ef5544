"""Embedding of a split: its images and captions through any encoder, in order. No torch.

An encoder is the cache (:class:`CachedTeacher`), a torch student (``student_rows.StudentRows``), or two functions of
stored bytes and of captions (:class:`BytesEncoder`), such as an ONNX student's. All embed the same rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from teacher_cache.pipeline.evaluate.split import EvaluationSplit
from teacher_cache.storage.format.layout import Tower
from teacher_cache.storage.look.nearest import unit_rows

__all__ = ["BytesEncoder", "CachedTeacher", "Embedded", "SplitEncoder", "embed"]

_ROWS_AT_ONCE = 65_536

Progress = Callable[[str, int, int], None]
Embedded = tuple[NDArray[np.float32], NDArray[np.float32]]
"""Rows of the images and of the captions of a split, float32 (rows, dim), unit norm."""


class SplitEncoder(Protocol):
    """A model, or a cache of its embeddings, that yields unit rows of a split in batches, in order."""

    def images(self, split: EvaluationSplit) -> Iterator[NDArray[Any]]:
        """Yield the rows of all images, (batch, dim)."""

    def captions(self, split: EvaluationSplit) -> Iterator[NDArray[Any]]:
        """Yield the rows of all captions, (batch, dim)."""


def embed(split: EvaluationSplit, encoder: SplitEncoder, progress: Progress | None = None) -> Embedded:
    """Embed all images and captions of a split.

    Args:
        progress: called with ("images" or "captions", done, total) after each batch.

    Raises:
        OSError, CacheMismatchError: an image cannot be read, or has changed; see ``EvaluationSplit.image_bytes``.
        ValueError: the encoder's number of rows differs from the split's.
    """
    return (
        _gathered("images", len(split.image_rows), encoder.images(split), progress),
        _gathered("captions", len(split.caption_rows), encoder.captions(split), progress),
    )


def _gathered(
    stage: str, total: int, batches: Iterator[NDArray[Any]], progress: Progress | None
) -> NDArray[np.float32]:
    rows, done = np.empty((0, 0), np.float32), 0
    for batch in batches:
        if not done:
            rows = np.empty((total, batch.shape[1]), np.float32)
        rows[done : done + len(batch)] = batch
        done += len(batch)
        if progress is not None:
            progress(stage, done, total)
    if done != total:
        raise ValueError(f"the encoder gave {done:,} rows for {total:,} {stage}")
    return rows


class CachedTeacher:
    """The teacher's cached rows of view 0, the evaluation crop. No model runs."""

    def images(self, split: EvaluationSplit) -> Iterator[NDArray[np.float32]]:
        """Yield unit rows of the images."""
        return self._rows(split, "image", split.image_rows)

    def captions(self, split: EvaluationSplit) -> Iterator[NDArray[np.float32]]:
        """Yield unit rows of the captions."""
        return self._rows(split, "text", split.caption_rows)

    def _rows(self, split: EvaluationSplit, tower: Tower, rows: NDArray[np.int64]) -> Iterator[NDArray[np.float32]]:
        for start in range(0, len(rows), _ROWS_AT_ONCE):
            yield unit_rows(split.reader.take(tower, rows[start : start + _ROWS_AT_ONCE]))


@dataclass(frozen=True)
class BytesEncoder:
    """Two functions that embed stored bytes of images, and captions, into unit rows.

    Attributes:
        batch_size: number of images, or captions, per call.
    """

    encode_images: Callable[[list[bytes]], NDArray[Any]]
    encode_captions: Callable[[list[str]], NDArray[Any]]
    batch_size: int = 256

    def images(self, split: EvaluationSplit) -> Iterator[NDArray[Any]]:
        """Yield rows of the images, after checking their bytes against the cache."""
        for positions in self._batches(range(len(split.image_rows))):
            yield self.encode_images([split.image_bytes(at) for at in positions])

    def captions(self, split: EvaluationSplit) -> Iterator[NDArray[Any]]:
        """Yield rows of the captions."""
        for texts in self._batches(split.captions):
            yield self.encode_captions(list(texts))

    def _batches(self, items: Sequence[Any]) -> Iterator[Sequence[Any]]:
        return (items[start : start + self.batch_size] for start in range(0, len(items), self.batch_size))
