"""Teacher and student as encoders of images and texts for zero-shot classification (ZeroShotEncoder)."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from teacher_cache.pipeline.data.images.preprocess import Preprocess
from teacher_cache.pipeline.models.student import load_student, student_tokenizer
from teacher_cache.pipeline.models.teacher import LiveTeacher
from teacher_cache.storage.look.nearest import unit_rows

__all__ = ["StudentEncoder", "TeacherEncoder"]


class TeacherEncoder:
    """A live teacher. Rows are rounded to float16, as in a float16 cache."""

    def __init__(self, teacher: LiveTeacher) -> None:
        self._teacher = teacher
        self._pixels = _Pixels(teacher.preprocess)

    def embed_images(self, images: Sequence[Image.Image]) -> NDArray[np.float32]:
        """Return unit rows, float32 (images, dim).

        Raises:
            ValueError: an image is too long a strip to be resized.
        """
        return unit_rows(self._teacher.encode_images(self._pixels(images)).embedding)

    def embed_texts(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Return unit rows, float32 (texts, dim)."""
        return unit_rows(self._teacher.encode_texts(self._teacher.tokenizer(list(texts))).embedding)


class StudentEncoder:
    """The student of a run's checkpoint folder."""

    def __init__(self, checkpoint: Path, device: torch.device) -> None:
        """Load the student.

        Raises:
            UsageError: the checkpoint is missing or cannot be used.
        """
        student, architecture = load_student(checkpoint)
        self._student = student.to(device).eval()
        self._tokenizer = student_tokenizer(architecture)
        self._device = device
        self._pixels = _Pixels(student.preprocess)

    @torch.inference_mode()
    def embed_images(self, images: Sequence[Image.Image]) -> NDArray[np.float32]:
        """Return unit rows, float32 (images, dim).

        Raises:
            ValueError: an image is too long a strip to be resized.
        """
        rows = self._student.encode_image(self._pixels(images).to(self._device))
        return np.asarray(rows.float().cpu().numpy())

    @torch.inference_mode()
    def embed_texts(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Return unit rows, float32 (texts, dim)."""
        tokens = self._student.shorten(self._tokenizer(list(texts)))
        return np.asarray(self._student.encode_text(tokens.to(self._device)).float().cpu().numpy())


class _Pixels:
    """Transform of decoded images to one batch of model input, in a thread pool."""

    def __init__(self, preprocess: Preprocess) -> None:
        self._transform = preprocess.transform()

    def __call__(self, images: Sequence[Image.Image]) -> torch.Tensor:
        with ThreadPoolExecutor() as pool:
            return torch.stack(list(pool.map(self._transform, images)))
