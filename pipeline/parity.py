"""The parity gate: features of an exported tower against those of the model it was made from. No torch."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from pipeline.deployment import DeploymentError

__all__ = ["WANTED_COSINE", "least_cosine", "require_parity"]

WANTED_COSINE = 0.99999
"""What float32 artefacts are held to: rounding costs 1e-6 at most, a wrong operator or weight far more."""


def least_cosine(a: NDArray[np.float32], b: NDArray[np.float32]) -> float:
    """The least cosine between row i of ``a`` and row i of ``b``, in float64.

    Args:
        a: (rows, dim), at least one row; of any length, it is divided out.
        b: the same shape, the same rows in the same order.

    Returns:
        From -1 to 1. NaN if any value is not finite or a row is zero, which no gate lets through.

    Raises:
        ValueError: other shapes, or no rows: nothing would have been compared.
    """
    if a.shape != b.shape or a.ndim != 2 or not len(a):
        raise ValueError(f"rows of the same shape are wanted, at least one: found {a.shape} and {b.shape}")
    left, right = a.astype(np.float64), b.astype(np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        cosines = (left * right).sum(1) / (np.linalg.norm(left, axis=1) * np.linalg.norm(right, axis=1))
    # min of numpy gives NaN if one is NaN
    return float(cosines.min())


def require_parity(name: str, least: float, wanted: float = WANTED_COSINE) -> None:
    """Let an artefact pass, or say by how much it fails.

    Args:
        name: of the artefact, for the message.
        least: its :func:`least_cosine` to the model it was made from.
        wanted: passes above it; at it or below, and as NaN, it fails.

    Raises:
        DeploymentError: it fails.
    """
    if not least > wanted:
        raise DeploymentError(
            f"{name}: not the model it was made from: its least cosine to it is {least:.7f}, above {wanted:.7f} is "
            f"wanted, {wanted - least:.2e} are missing. Nothing was deployed; please report the student's config."
        )
