"""Gates that each file of a deployment must pass before it is shipped. An error says by how much a file fails."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from teacher_cache.pipeline.data.images.decode import decode_image
from teacher_cache.pipeline.deploy.record import DeploymentError
from teacher_cache.pipeline.deploy.table import Gate
from teacher_cache.pipeline.evaluate.recall import RetrievalRanks, recall_of_ranks
from teacher_cache.pipeline.evaluate.split import EvaluationSplit
from teacher_cache.pipeline.models.student import Student

_WEIGHTS_ROWS = 32


def require_finite_weights(checkpoint: Path, student: Student) -> None:
    """Check that the weights of a checkpoint are finite.

    Raises:
        DeploymentError: a tensor is not finite; the message names the first.
    """
    wrong = [name for name, tensor in student.model.state_dict().items() if not torch.isfinite(tensor).all()]
    if wrong:
        raise DeploymentError(
            f"{checkpoint}: {len(wrong)} tensors have NaN or infinite weights, {wrong[0]} the first. Nothing was "
            "deployed. Deploy the run's other checkpoint (--checkpoint best or last), or train anew."
        )


def require_weights(
    folder: Path, split: EvaluationSplit, image: NDArray[np.float32], text: NDArray[np.float32]
) -> Gate:
    """Check that ``open_clip_model.safetensors``, loaded by open_clip alone, is the trained student.

    Args:
        image, text: features of the split from the trained student.

    Raises:
        DeploymentError: its features differ.
    """
    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")
    model.eval()
    images, captions = min(_WEIGHTS_ROWS, len(image)), split.captions[:_WEIGHTS_ROWS]
    pixels = torch.stack([preprocess(decode_image(split.image_bytes(position))) for position in range(images)])
    with torch.inference_mode():
        found_image = F.normalize(model.encode_image(pixels), dim=-1).numpy()
        found_text = F.normalize(model.encode_text(tokenizer(captions)), dim=-1).numpy()
    # Python's min may ignore NaN, numpy's returns it
    least = float(np.min([least_cosine(found_image, image[:images]), least_cosine(found_text, text[: len(captions)])]))
    return require_parity(
        "open_clip_model.safetensors in open_clip", least, f"least cosine, {images + len(captions)} rows"
    )


def require_finite(name: str, *features: NDArray[np.float32]) -> None:
    """Check that the features of quantised files are finite, so that recall is defined.

    Raises:
        DeploymentError: a feature is not finite.
    """
    wrong = sum(int((~np.isfinite(rows)).any(axis=1).sum()) for rows in features)
    if wrong:
        raise DeploymentError(
            f"{name}: {wrong:,} of {sum(map(len, features)):,} rows are NaN or infinite. Nothing was deployed. Ship "
            "without int8 (--no-int8)."
        )


def require_recall(name: str, found: RetrievalRanks, fp32: RetrievalRanks, most: float) -> Gate:
    """Check that quantised files lose at most ``most`` points, or one query, of any recall against the float32 files.

    Args:
        name: name of the files, for the message.
        most: points; 0 allows not even one query.

    Raises:
        DeploymentError: a recall loses more; the message has both values.
    """
    ours, theirs = recall_of_ranks(found), recall_of_ranks(fp32)
    queries = {"i2t": (len(fp32.i2t), "images"), "t2i": (len(fp32.t2i), "captions")}
    allowed = {direction: max(most, 100 / count) if most else 0.0 for direction, (count, _) in queries.items()}
    losses = {
        (direction, metric): theirs[direction][metric] - value
        for direction, recalls in ours.items()
        for metric, value in recalls.items()
    }
    (direction, metric), loss = max(losses.items(), key=lambda item: item[1] - allowed[item[0][0]])
    count, what = queries[direction]
    one = f" or one of {count:,} {what}" if most else ""
    # 1e-9: a loss of exactly the maximum may be rounded up
    if loss > allowed[direction] + 1e-9:
        raise DeploymentError(
            f"{name}: {direction} {metric} is {ours[direction][metric]:.2f}, and {theirs[direction][metric]:.2f} in "
            f"fp32: {round(loss * count / 100):,} of {count:,} {what} lost, {loss:.2f} points; at most {most:g} "
            f"{'point' if most == 1 else 'points'}{one} may be. Nothing was deployed. Calibrate on more images "
            "(--calibration-images), accept it (--max-recall-loss), or ship without int8 (--no-int8)."
        )
    return Gate(
        name=f"{name}: points of recall lost to fp32, the most ({direction} {metric})",
        found=loss,
        wanted=f"<= {most:g}{one}",
    )


WANTED_COSINE = 0.99999
"""Minimum cosine of float32 artefacts: rounding costs at most 1e-6, a wrong operator or weight far more."""


def least_cosine(a: NDArray[np.float32], b: NDArray[np.float32]) -> float:
    """Return the smallest cosine between row i of ``a`` and row i of ``b``, in float64.

    Args:
        a: (rows, dim), at least one row, of any norm.
        b: the same rows in the same order.

    Returns:
        From -1 to 1. NaN, which fails every gate, if a value is not finite or a row is zero.

    Raises:
        ValueError: the shapes differ, or there are no rows.
    """
    return float(row_cosines(a, b).min())


def row_cosines(a: NDArray[np.float32], b: NDArray[np.float32]) -> NDArray[np.float64]:
    """Return the cosine of row i of ``a`` and row i of ``b``, (rows,); see :func:`least_cosine`."""
    if a.shape != b.shape or a.ndim != 2 or not len(a):
        raise ValueError(f"rows of the same shape are wanted, at least one: found {a.shape} and {b.shape}")
    first, second = a.astype(np.float64), b.astype(np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        cosines: NDArray[np.float64] = (first * second).sum(1) / (
            np.linalg.norm(first, axis=1) * np.linalg.norm(second, axis=1)
        )
    return cosines


def require_parity(file: str, least: float, number: str = "least cosine") -> Gate:
    """Check that a float32 file computes what its model computes.

    Args:
        file: name of the file, for the message.
        least: :func:`least_cosine` of its features to the model's; NaN fails.
        number: name of that number, for the gate.

    Raises:
        DeploymentError: the cosine is too small; the message says by how much.
    """
    if not least > WANTED_COSINE:
        raise DeploymentError(
            f"{file}: differs from the model that it was made from: least cosine {least:.7f}, "
            f"{WANTED_COSINE - least:.2e} below the required {WANTED_COSINE:.7f}. Nothing was deployed. Please report "
            "the student's config."
        )
    return Gate(name=f"{file}: {number}", found=least, wanted=f"> {WANTED_COSINE}")
