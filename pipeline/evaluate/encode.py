"""Embed rows of a cache with a student, for its evaluation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from teacher_cache.pipeline.data.batches.inputs import InputLoader
from teacher_cache.pipeline.models.student import Student

__all__ = ["encode_rows", "projected"]


def encode_rows(
    student: Student,
    image_rows: NDArray[np.int64],
    captions: Sequence[str],
    inputs: InputLoader,
    device: torch.device,
    batch_size: int = 256,
    progress: Callable[[str, int, int], None] | None = None,
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """The student's normalised features of some images and captions, float32 (rows, embed_dim), in their order.

    Args:
        student: on ``device``; measured in evaluation mode and left in the mode that it came in.
        image_rows: of the cache that ``inputs`` is of.
        inputs: for this student.

    Raises:
        OSError: an image cannot be read where the source of ``inputs`` says.
        FloatingPointError: a feature is no finite number.
    """
    image = np.empty((len(image_rows), student.embed_dim), np.float32)
    text = np.empty((len(captions), student.embed_dim), np.float32)

    def report(stage: str, done: int, total: int) -> None:
        if progress is not None:
            progress(stage, done, total)

    training = student.training
    student.eval()
    with torch.inference_mode():
        done = 0
        for pixels in inputs.evaluation_crops(image_rows, batch_size):
            image[done : done + len(pixels)] = student.encode_image(pixels.to(device)).cpu().numpy()
            done += len(pixels)
            report("images", done, len(image_rows))
        for start in range(0, len(captions), batch_size):
            part = list(captions[start : start + batch_size])
            features = student.encode_text(student.shorten(inputs.tokenizer(part)).to(device)).cpu().numpy()
            text[start : start + len(part)] = features
            report("captions", start + len(part), len(captions))
    student.train(training)
    for what, rows in (("images", image), ("captions", text)):
        if not np.isfinite(rows).all():
            raise FloatingPointError(
                f"the student's features of {what} are NaN or infinite. Take the other checkpoint (best or last), or "
                "train anew"
            )
    return image, text


def projected(
    student: Student, image: NDArray[np.float32], text: NDArray[np.float32]
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Features of :func:`encode_rows` in the teacher's space, float32 (rows, teacher_dim), normalised.

    Where the widths are the same that is the student's own space: the very arrays come back. Worked out on the CPU.
    """
    if student.embed_dim == student.teacher_dim:
        return image, text

    def through(projection: Any, rows: NDArray[np.float32]) -> NDArray[np.float32]:
        weight = projection.weight.detach().float().cpu()
        found: NDArray[np.float32] = F.normalize(F.linear(torch.from_numpy(rows), weight), dim=-1).numpy()
        return found

    return through(student.image_projection, image), through(student.text_projection, text)
