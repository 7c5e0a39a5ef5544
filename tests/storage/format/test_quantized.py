"""int8 rounding: how far a value may move, what stands for no value, and that nothing else is ever made of either."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from teacher_cache.storage.format.int8 import NO_EMBEDDING, dequantize, norm_slack, quantize, unit_dequantized

ROWS = arrays(
    np.float16,
    array_shapes(min_dims=2, max_dims=2, max_side=12),
    elements=st.floats(-60_000, 60_000, width=16, allow_subnormal=True),
)


@given(ROWS)
def test_no_value_moves_by_more_than_half_a_step(rows: np.ndarray) -> None:
    stored, step = quantize(rows)
    assert (stored.dtype, step.dtype, step.shape) == (np.int8, np.float32, (1, rows.shape[1]))
    assert (stored != NO_EMBEDDING).all()
    steps = step.astype(np.float64)
    moved = np.abs(rows.astype(np.float64) - stored * steps)
    assert (moved <= steps / 2 * (1 + 1e-12)).all()  # float64's own rounding of the quotient
    # no step is larger than it has to be
    np.testing.assert_allclose(127 * steps[0], np.abs(rows.astype(np.float64)).max(axis=0), rtol=2.0**-23)


@given(ROWS, st.data())
def test_a_row_without_embedding_stays_one_and_moves_no_other(rows: np.ndarray, data: st.DataObject) -> None:
    lost = data.draw(arrays(np.bool_, len(rows)))
    with_lost = rows.copy()
    with_lost[lost] = np.nan
    stored, step = quantize(with_lost)
    assert (stored[lost] == NO_EMBEDDING).all()
    for values in (dequantize(stored, step), unit_dequantized(stored, step)):
        assert np.isnan(values[lost]).all()
        assert np.isfinite(values[~lost]).all()
    kept, kept_step = quantize(rows[~lost])
    np.testing.assert_array_equal(stored[~lost], kept)
    np.testing.assert_array_equal(step, kept_step)


@given(st.integers(0, 2**32 - 1), st.integers(1, 40), st.integers(1, 64))
def test_unit_rows_come_back_as_unit_rows(seed: int, count: int, dim: int) -> None:
    rows = np.random.default_rng(seed).standard_normal((count, dim))
    rows[:, 0] += 8  # as CLIP's few large columns
    unit = (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float16)
    stored, step = quantize(unit)
    found = unit_dequantized(stored, step)
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-6)
    off = np.abs(np.linalg.norm(dequantize(stored, step), axis=1) - np.linalg.norm(unit.astype(np.float64), axis=1))
    assert (off <= norm_slack(step) + 1e-6).all()
    # an error of length |step| / 2 turns a unit row by its arc sine at most
    cosines = np.einsum("nd,nd->n", found, unit.astype(np.float64)) / np.linalg.norm(unit.astype(np.float64), axis=1)
    assert (cosines >= np.sqrt(1 - min(1.0, (norm_slack(step) * (1 + 2**-10)) ** 2)) - 1e-6).all()


def test_a_row_of_zeros_gets_no_direction() -> None:
    stored, step = quantize(np.zeros((2, 3), np.float16))
    np.testing.assert_array_equal(unit_dequantized(stored, step), np.zeros((2, 3)))
