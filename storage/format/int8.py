"""int8 embeddings: a whole number for each value, and a scale for each column of a chunk.

Symmetric, by the greatest magnitude of the column (Krishnamoorthi 2018, Quantizing deep convolutional networks for
efficient inference, section 2.2, with a column for a channel): ``step = max |x| / 127``, ``q = round(x / step)``, so
that ``|x - q * step| <= step / 2`` for every value. A few columns of CLIP's embeddings are far larger than the others;
with a step of their own they cost the others nothing.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

NO_EMBEDDING = -128
"""Value in rows without an embedding and in padding, since int8 has no NaN. Embeddings use -127 to 127."""

_GREATEST = 127


def quantize(rows: NDArray[np.float16]) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """Round the rows of one chunk.

    Args:
        rows: (rows, dim) float16; rows without an embedding are NaN.

    Returns:
        (rows, dim) int8, :data:`NO_EMBEDDING` where a value is NaN; and (1, dim) float32, the step of each column, 0
        for a column of zeros. A pure function of the rows: equal chunks give equal bytes.
    """
    wide = rows.astype(np.float64)  # a float32 quotient could round to the wrong step
    lost = np.isnan(wide)
    wide[lost] = 0
    step = (np.abs(wide).max(axis=0, initial=0, keepdims=True) / _GREATEST).astype(np.float32)
    wide /= np.where(step > 0, step, 1).astype(np.float64)
    whole = np.rint(wide).astype(np.int8)  # 127 at most: the step is off by 2^-24 of itself
    whole[lost] = NO_EMBEDDING
    return whole, step


def dequantize(stored: NDArray[np.int8], step: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return stored rows as float32 (rows, dim), with NaN for :data:`NO_EMBEDDING`.

    Args:
        stored: (rows, dim).
        step: (1, dim), or (rows, dim) for rows of several chunks.
    """
    values = stored.astype(np.float32)
    values *= step
    lost = stored == NO_EMBEDDING
    if lost.any():  # the check is cheap, the masked write is not
        values[lost] = np.nan
    return values


def unit_dequantized(stored: NDArray[np.int8], step: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return rows as readers do: float32 of unit norm, NaN for a row without embedding.

    Norms are summed in float64. Rounding to float32 then hides the order of the sum, which differs between machines.

    Args:
        stored: (rows, dim).
        step: (1, dim), or (rows, dim) for rows of several chunks.
    """
    values = dequantize(stored, step)
    norms = np.sqrt(np.einsum("nd,nd->n", values, values, dtype=np.float64))
    with np.errstate(divide="ignore", invalid="ignore"):
        # a row of zeros stays zero: it has no direction
        factors = np.where(norms > 0, 1 / norms, norms).astype(np.float32)
    values *= factors[:, None]
    return values


def norm_slack(step: NDArray[Any]) -> float:
    """Return the maximum change of a row's norm by rounding: half the length of (1, dim) ``step``."""
    return float(np.linalg.norm(step.astype(np.float64))) / 2
