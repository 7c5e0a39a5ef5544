"""A torch student as an encoder of a split (``embed.SplitEncoder``). Imports no teacher, since training uses it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from teacher_cache.pipeline.data.batches.inputs import InputLoader
from teacher_cache.pipeline.evaluate.split import Embedded, EvaluationSplit
from teacher_cache.pipeline.models.device import full_float32
from teacher_cache.pipeline.models.student import Student


@dataclass(frozen=True)
class StudentRows:
    """A student that embeds a split with the pixels of its training.

    Attributes:
        student: student on ``device``; switched to evaluation mode while it embeds.
        inputs: loader of pixels and tokens for this student.
        batch_size: number of images, or captions, per forward pass.
    """

    student: Student
    inputs: InputLoader
    device: torch.device
    batch_size: int = 256

    def images(self, split: EvaluationSplit) -> Iterator[NDArray[np.float32]]:
        """Yield features of the images.

        Raises:
            OSError: an image cannot be read.
            FloatingPointError: a feature is not finite.
        """
        with _evaluating(self.student):
            for pixels in self.inputs.evaluation_crops(split.image_rows, self.batch_size):
                yield _finite("images", self.student.encode_image(pixels.to(self.device)))

    def captions(self, split: EvaluationSplit) -> Iterator[NDArray[np.float32]]:
        """Yield features of the captions.

        Raises:
            FloatingPointError: a feature is not finite.
        """
        with _evaluating(self.student):
            for start in range(0, len(split.captions), self.batch_size):
                tokens = self.inputs.tokenizer(split.captions[start : start + self.batch_size])
                yield _finite("captions", self.student.encode_text(self.student.shorten(tokens).to(self.device)))


@contextmanager
def _evaluating(student: Student) -> Iterator[None]:
    training = student.training
    student.eval()
    try:
        with torch.inference_mode(), full_float32():
            yield
    finally:
        student.train(training)


def _finite(what: str, features: Tensor) -> NDArray[np.float32]:
    rows = np.asarray(features.cpu().numpy(), np.float32)
    if not np.isfinite(rows).all():
        raise FloatingPointError(
            f"the student's features of {what} are NaN or infinite. Take the other checkpoint (best or last), or train "
            "anew"
        )
    return rows


def projected(student: Student, rows: Embedded) -> Embedded:
    """Return a student's features in the teacher's space, float32 (rows, teacher_dim), normalised; runs on the CPU.

    If the widths are equal the spaces are the same, and the same arrays are returned.
    """
    if student.embed_dim == student.teacher_dim:
        return rows

    def through(projection: Any, features: NDArray[np.float32]) -> NDArray[np.float32]:
        weight = projection.weight.detach().float().cpu()
        return np.asarray(F.normalize(F.linear(torch.from_numpy(features), weight), dim=-1).numpy())

    return through(student.image_projection, rows[0]), through(student.text_projection, rows[1])
