"""A student without chance: a frozen image trunk and the projection that fits a teacher's embeddings best.

A training's end differs from one seed to the next by more than most changes of its targets do. The least-squares
projection has neither seed nor order: what moves its recall is in the targets. Captions are the teacher's.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from teacher_cache.pipeline.data.images.preprocess import Preprocess
from teacher_cache.pipeline.evaluate.recall import retention, retrieval_recall
from teacher_cache.pipeline.models.student import load_student
from teacher_cache.storage.look.nearest import unit_rows
from teacher_cache.storage.read.reader import EmbeddingReader

_PENALTY = 0.01  # of the weights' squares, times the features' mean square: of 800 images there are fewer than columns
_AT_ONCE = 32


def trunk_features(start: Path, paths: Sequence[Path], device: str) -> NDArray[np.float32]:
    """What the trunk of a student gives for images, float32 (len(paths), width).

    Args:
        start: a folder of ``teacher-cache student inherit``.
    """
    student, _ = load_student(start)
    trunk: Any = student.model.visual.trunk.eval().to(device)  # type: ignore[union-attr,operator]
    transform = Preprocess.of_model(student.model).transform
    found = []
    for at in range(0, len(paths), _AT_ONCE):
        pixels = torch.stack([transform(Image.open(path)) for path in paths[at : at + _AT_ONCE]])
        with torch.inference_mode():
            found.append(trunk(pixels.to(device)).float().cpu().numpy())
    return np.concatenate(found)


def linear_retention(
    features: NDArray[np.float32],
    targets: NDArray[np.floating[Any]],
    teacher: EmbeddingReader,
    held_out: NDArray[np.int64],
) -> float:
    """Mean retention of the student that fits the targets best, in percent, by recall among images held out.

    Args:
        features: of the images that it learns, and behind them of those held out.
        targets: (images learned, dim), what it learns.
        teacher: whose captions, and whose images for comparison, the held out ones have.
        held_out: their rows in that cache.
    """
    learned, new = features[: len(targets)].astype(np.float64), features[len(targets) :].astype(np.float64)
    middle = learned.mean(axis=0)
    learned, new = learned - middle, new - middle
    mean = targets.astype(np.float64).mean(axis=0)
    squares = learned.T @ learned
    penalty = _PENALTY * np.trace(squares) / len(squares)
    weights = np.linalg.solve(squares + penalty * np.eye(len(squares)), learned.T @ (targets.astype(np.float64) - mean))
    image = unit_rows((new @ weights + mean).astype(np.float32))
    rows, of_image = teacher.caption_rows(held_out)
    text, whole = (teacher.take(tower, at).astype(np.float32) for tower, at in (("text", rows), ("image", held_out)))
    kept: float = retention(retrieval_recall(image, text, of_image), retrieval_recall(whole, text, of_image))["mean"]
    return kept
