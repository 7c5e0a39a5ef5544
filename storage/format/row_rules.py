"""Rules for the rows of one chunk, shared by writers and ``verify``."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from teacher_cache.storage.format.int8 import NO_EMBEDDING, dequantize, norm_slack
from teacher_cache.storage.format.layout import SCALE

# float16 rows of unit vectors: rounding moves the norm by at most 2^-11
UNIT_NORM_TOLERANCE = 2e-3


def wrong_rows(
    rows: range, arrays: dict[str, NDArray[Any]], quarantined: Collection[int]
) -> Iterator[tuple[str, str, str]]:
    """Yield each rule that the rows of a chunk break: (array, kind of finding, one sentence with the first row).

    Encoded rows are finite in every array and of unit norm, for int8 as far as rounding allows. Quarantined rows are
    NaN in every array, or -128 in int8.

    Args:
        rows: rows of the chunk.
        arrays: arrays by name without padding; int8 embeddings with their ``scale``.
        quarantined: rows without an embedding.
    """
    tolerance = UNIT_NORM_TOLERANCE
    if SCALE in arrays:
        scale = arrays[SCALE]
        wrong = ~(np.isfinite(scale) & (scale >= 0)).reshape(-1)
        if wrong.any():
            yield SCALE, "not-finite", f"column {np.flatnonzero(wrong)[0]} holds {scale.reshape(-1)[wrong][0]}"
            return
        tolerance += norm_slack(scale)
        arrays = {name: values for name, values in arrays.items() if name != SCALE}
        arrays["embedding"] = dequantize(arrays["embedding"], scale)
    numbers = np.arange(rows.start, rows.stop)
    lost = np.isin(numbers, list(quarantined))
    for name, values in arrays.items():
        table = values.reshape(len(rows), -1).astype(np.float32)
        for wrong, what in (
            (~lost & ~np.isfinite(table).all(axis=1), "NaN or infinity"),
            (lost & ~np.isnan(table).all(axis=1), "a value, though quarantined"),
        ):
            if wrong.any():
                yield name, "not-finite", f"row {numbers[wrong][0]} holds {what} ({int(wrong.sum())} such rows)"
    norms = np.linalg.norm(arrays["embedding"].astype(np.float32), axis=1)
    far = ~lost & (np.abs(norms - 1) > tolerance)
    if far.any():
        row, norm = numbers[far][0], norms[far][0]
        yield "embedding", "not-unit-norm", f"row {row} has norm {norm:.4f}, 1 wanted ({int(far.sum())} such rows)"


def is_nan(values: NDArray[Any]) -> NDArray[np.bool_]:
    """Return a mask of missing values: NaN, or -128 in int8."""
    mask: NDArray[np.bool_] = values == NO_EMBEDDING if values.dtype == np.int8 else np.isnan(values)
    return mask


def has_nan(values: NDArray[Any]) -> bool:
    """Return whether :func:`is_nan` is true anywhere in a contiguous array; ten times as fast for float16.

    Read as integers, NaNs are larger than infinity, or than minus infinity if their sign bit is set (IEEE 754).
    """
    if not values.size:
        return False
    if values.dtype == np.int8:
        return bool(values.min() == NO_EMBEDDING)
    return any(np.maximum.reduce(values.view(whole), axis=None) > bound for whole, bound in _infinities(values.dtype))


@cache
def _infinities(dtype: np.dtype[Any]) -> list[tuple[np.dtype[Any], int]]:
    """Return infinity as a signed and minus infinity as an unsigned integer, each with its dtype."""
    infinity = np.array(np.inf, dtype)
    wholes = [np.dtype(f"{dtype.byteorder}{kind}{dtype.itemsize}") for kind in "iu"]
    return [(whole, int(bound.view(whole))) for whole, bound in zip(wholes, (infinity, -infinity), strict=True)]
