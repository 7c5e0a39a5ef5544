"""Embed rows of a cache with a student, for its evaluation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.batches import StudentImages, load_items
from pipeline.samples import ImageSource
from pipeline.student import Student, student_tokenizer
from storage.reader import EmbeddingReader

__all__ = ["encode_rows"]


def encode_rows(
    student: Student,
    config: dict[str, Any],
    reader: EmbeddingReader,
    image_rows: NDArray[np.int64],
    caption_rows: NDArray[np.int64],
    image_root: str,
    device: torch.device,
    batch_size: int = 256,
    workers: int | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """The student's normalised features of some images and captions, float32 (rows, embed_dim), in their order.

    Args:
        student: on ``device``; measured in evaluation mode and left in the mode that it came in.
        config: its open_clip model config, which names its tokenizer.

    Raises:
        OSError: an image cannot be read where ``image_root`` says.
    """
    tokenizer = student_tokenizer(config)
    texts = reader.captions["text"]
    loader = load_items(
        StudentImages(reader, ImageSource(image_root), student.preprocess),
        workers,
        device,
        batch_size=batch_size,
        sampler=image_rows.tolist(),
    )
    image = np.empty((len(image_rows), student.embed_dim), np.float32)
    text = np.empty((len(caption_rows), student.embed_dim), np.float32)

    def report(stage: str, done: int, total: int) -> None:
        if progress is not None:
            progress(stage, done, total)

    training = student.training
    student.eval()
    with torch.inference_mode():
        done = 0
        for pixels in loader:
            image[done : done + len(pixels)] = student.encode_image(pixels.to(device)).cpu().numpy()
            done += len(pixels)
            report("images", done, len(image_rows))
        for start in range(0, len(caption_rows), batch_size):
            part = texts.take(caption_rows[start : start + batch_size]).to_pylist()
            features = student.encode_text(student.shorten(tokenizer(part)).to(device)).cpu().numpy()
            text[start : start + len(part)] = features
            report("captions", start + len(part), len(caption_rows))
    student.train(training)
    return image, text
