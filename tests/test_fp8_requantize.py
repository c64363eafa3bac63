"""Floats that have been FP8 before keep their codes and scales."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from fp8_cases import (
    BF16,
    CALLS,
    oracle_dequantize,
    oracle_quantize,
    random_codes,
    random_scales,
)
from helpers import bits

from minimax_jax.errors import NumericError
from minimax_jax.ops.checks import grid_shape
from minimax_jax.ops.fp8 import FP8, FP8_MAX, quantize, requantize


@CALLS
@pytest.mark.parametrize("dtype", [np.float32, BF16])
def test_requantize_keeps_the_scales_of_unchanged_matrices_only(call, dtype):
    rng, block = np.random.default_rng(17), (16, 16)
    codes, scale = random_codes(rng, (2, 3, 40, 40)), random_scales(rng, (2, 3, 3, 3))
    x = oracle_dequantize(codes, scale, dtype, block)
    bits(x)[0, 1, 39, 39] += 1
    bits(x)[1, 2] ^= 1
    values, scales, kept = call(lambda x, s: requantize(x, s, block=block))(x, scale)
    expected = np.array([[True, False, True], [True, True, False]])
    np.testing.assert_array_equal(kept, expected)
    np.testing.assert_array_equal(bits(values)[expected], bits(codes)[expected])
    np.testing.assert_array_equal(np.asarray(scales)[expected], scale[expected])
    fresh_values, fresh_scales = oracle_quantize(x, block)
    np.testing.assert_array_equal(bits(values)[~expected], bits(fresh_values)[~expected])
    np.testing.assert_array_equal(np.asarray(scales)[~expected], fresh_scales[~expected])


def test_requantize_keeps_the_sign_of_zero_and_the_grids_of_parts():
    rng, block = np.random.default_rng(18), (8, 8)
    codes, scale = random_codes(rng, (3, 9, 22)), random_scales(rng, grid_shape((3, 9, 22), block, parts=2))
    codes[:, 0, 0] = 0
    x = oracle_dequantize(codes, scale, BF16, block, parts=2)
    assert np.asarray(requantize(x, scale, block=block, parts=2)[2]).all()
    x[1, 0, 0] = -0.0
    values, _, kept = requantize(x, scale, block=block, parts=2)
    np.testing.assert_array_equal(kept, [True, True, True])  # -0 has a code of its own
    assert bits(values)[1, 0, 0] == 0x80


def test_requantize_of_one_matrix_and_of_zeros_under_scale_zero():
    x = np.zeros((4, 4), np.float32)
    values, scales, kept = requantize(x, np.zeros((1, 1), np.float32), block=(4, 4))
    assert kept.shape == ()
    assert kept
    assert np.asarray(scales) == 0
    assert not bits(values).any()
    _, scales, kept = requantize(x, np.full((1, 1), np.nan, np.float32), block=(4, 4))
    assert not kept
    assert np.asarray(scales) == 1


def test_requantize_refuses_nan_and_poisons_a_trace():
    x, scale = np.ones((2, 4, 4), np.float32), np.ones((2, 1, 1), np.float32)
    x[1, 0, 0] = np.nan
    with pytest.raises(NumericError, match="1 values"):
        requantize(x, scale, block=(4, 4))
    _, scales, kept = jax.jit(lambda x, s: requantize(x, s, block=(4, 4)))(x, scale)
    np.testing.assert_array_equal(kept, [True, False])
    np.testing.assert_array_equal(np.isnan(scales).ravel(), [False, True])


def test_grid_shape():
    assert grid_shape((1536, 3072), (128, 128)) == (12, 24)
    assert grid_shape((7, 129, 1), (128, 128)) == (7, 2, 1)
    assert grid_shape((4, 384), (128, 128), parts=2) == (1, 4)
    assert float(jnp.finfo(FP8).max) == FP8_MAX


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.float16])
@pytest.mark.parametrize("poison", [np.nan, -np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("place", [(0, 0), (37, 200), (255, 383)])
def test_one_nan_or_infinity_in_large_blocks_is_never_lost(dtype, poison, place, monkeypatch):
    x = np.ones((256, 384), dtype)
    x[place] = poison
    with pytest.raises(NumericError, match="1 values are NaN or infinite"):
        quantize(jnp.asarray(x))
    scales = np.asarray(jax.jit(lambda x: quantize(x)[1])(x))
    expected = np.zeros((2, 3), bool)
    expected[place[0] // 128, place[1] // 128] = True
    np.testing.assert_array_equal(np.isnan(scales), expected)
    kept = jax.jit(lambda x: requantize(x, np.ones((2, 3), np.float32))[2])(x)
    assert not kept.any()
