"""What each file of a deployment has to pass before it is shipped; a file that fails says by how much."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from pipeline.decode import decode_image
from pipeline.deployment import DeploymentError
from pipeline.evaluation_split import EvaluationSplit
from pipeline.metrics import RetrievalRanks, recall_of_ranks
from pipeline.parity import WANTED_COSINE, least_cosine, require_parity
from pipeline.student import Student
from pipeline.student_table import Gate

__all__ = ["require_features", "require_finite", "require_finite_weights", "require_recall", "require_weights"]

_WEIGHTS_ROWS = 32


def require_finite_weights(checkpoint: Path, student: Student) -> None:
    """The weights of a checkpoint are numbers: before a file is made of them.

    Raises:
        DeploymentError: names the first tensor that has others.
    """
    wrong = [name for name, tensor in student.model.state_dict().items() if not torch.isfinite(tensor).all()]
    if wrong:
        raise DeploymentError(
            f"{checkpoint}: {len(wrong)} tensors have NaN or infinite weights, {wrong[0]} the first. Nothing was "
            "deployed. Deploy the run's other checkpoint (--checkpoint best or last), or train anew."
        )


def require_features(file: str, found: NDArray[np.float32], torch_rows: NDArray[np.float32]) -> Gate:
    """A float32 file makes the features of the model it was made from, on every row that recall is measured on.

    Args:
        found: (rows, dim), by the file.
        torch_rows: the same inputs by the model.

    Raises:
        DeploymentError: one row does not.
    """
    least = least_cosine(found, torch_rows)
    require_parity(file, least)
    return Gate(name=f"{file}: least cosine to torch, {len(found):,} rows", found=least, wanted=f"> {WANTED_COSINE}")


def require_weights(
    folder: Path, split: EvaluationSplit, image: NDArray[np.float32], text: NDArray[np.float32]
) -> Gate:
    """``model.safetensors``, loaded as anybody loads it, by open_clip alone, is the student that was trained.

    Args:
        image, text: rows of the split by the student that was trained.

    Raises:
        DeploymentError: it is not.
    """
    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")
    model.eval()
    images, captions = min(_WEIGHTS_ROWS, len(image)), split.captions[:_WEIGHTS_ROWS]
    pixels = torch.stack([preprocess(decode_image(split.image_bytes(position))) for position in range(images)])
    with torch.inference_mode():
        found_image = F.normalize(model.encode_image(pixels), dim=-1).numpy()
        found_text = F.normalize(model.encode_text(tokenizer(captions)), dim=-1).numpy()
    # numpy's min: Python's lets NaN through
    least = float(np.min([least_cosine(found_image, image[:images]), least_cosine(found_text, text[: len(captions)])]))
    name = "model.safetensors in open_clip"
    require_parity(name, least)
    return Gate(name=f"{name}: least cosine, {images + len(captions)} rows", found=least, wanted=f"> {WANTED_COSINE}")


def require_finite(name: str, *features: NDArray[np.float32]) -> None:
    """Features of quantised files are numbers, so that recall is defined.

    Raises:
        DeploymentError: some are not.
    """
    wrong = sum(int((~np.isfinite(rows)).any(axis=1).sum()) for rows in features)
    if wrong:
        raise DeploymentError(
            f"{name}: {wrong:,} of {sum(map(len, features)):,} rows are NaN or infinite. Nothing was deployed. Ship "
            "without int8 (--no-int8)."
        )


def require_recall(name: str, found: RetrievalRanks, fp32: RetrievalRanks, most: float) -> Gate:
    """Quantised files lose no more than ``most`` points of any recall against the float32 files.

    Args:
        name: of the files, for the message.

    Raises:
        DeploymentError: one recall loses more; names it with both values.
    """
    ours, theirs = recall_of_ranks(found), recall_of_ranks(fp32)
    losses = {
        (direction, metric): theirs[direction][metric] - value
        for direction, recalls in ours.items()
        for metric, value in recalls.items()
    }
    (direction, metric), loss = max(losses.items(), key=lambda item: item[1])
    # recalls are shares of whole numbers: a point lost exactly may be a rounding error above one
    if loss > most + 1e-9:
        raise DeploymentError(
            f"{name}: {direction} {metric} is {ours[direction][metric]:.2f}, and {theirs[direction][metric]:.2f} in "
            f"fp32: {loss:.2f} points lost, {most:g} at most are wanted, {loss - most:.2f} too many. Nothing was "
            "deployed. Calibrate on more images (--calibration-images), accept it (--max-recall-loss), or ship without "
            "int8 (--no-int8)."
        )
    return Gate(
        name=f"{name}: points of recall lost to fp32, the most ({direction} {metric})",
        found=loss,
        wanted=f"<= {most:g}",
    )
