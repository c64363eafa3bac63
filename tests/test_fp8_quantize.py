"""Floats to codes and scales, bit for bit as numpy has it; and what cannot be quantised."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fp8_cases import (
    BF16,
    BLOCKS,
    CALLS,
    DTYPES,
    E4M3,
    FINITE,
    TINY,
    assert_same_bits,
    oracle_codes,
    oracle_dequantize,
    oracle_quantize,
    random_floats,
    random_scales,
)
from helpers import bits
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.extend.core import jaxprs_in_params

from minimax_jax.errors import LayoutError, NumericError
from minimax_jax.ops.fp8 import FP8_MAX, dequantize, quantize, requantize


def near(points, steps=3):
    """The float32 numbers around each point: itself and its neighbours."""
    return (
        (bits(points.astype(np.float32))[..., None] + np.arange(-steps, steps + 1)).astype(np.uint32).view(np.float32)
    )


def code_grid():
    values = np.arange(0x7F, dtype=np.uint8).view(E4M3).astype(np.float32)
    return np.concatenate([values[1:], (values[1:] + values[:-1]) / 2, [464, 480, 1e6]])


@CALLS
def test_codes_at_and_around_every_tie_under_many_scales(call):
    scale = np.abs(random_floats(np.random.default_rng(10), 4000))
    with np.errstate(over="ignore", under="ignore"):
        x = near(code_grid()[:, None] * scale.astype(np.float64))
    full = np.broadcast_to(scale[:, None], x.shape)
    good = np.isfinite(x) & (np.abs(x) >= TINY)
    x, full = x[good].reshape(1, -1), full[good].reshape(1, -1)
    x[:, ::2] *= -1
    values, _ = call(lambda x, s: quantize(x, s, block=(1, 1)))(x, full)
    assert x.size > 4_000_000
    np.testing.assert_array_equal(bits(values), bits(oracle_codes(x, full)))


def test_codes_of_random_quotients_of_every_magnitude():
    rng = np.random.default_rng(11)
    x, scale = random_floats(rng, (2000, 500)), random_floats(rng, (2000, 500))
    values, kept = quantize(x, scale, block=(1, 1))
    np.testing.assert_array_equal(bits(values), bits(oracle_codes(x, scale)))
    np.testing.assert_array_equal(kept, scale)


def test_dense_sweep_of_floats_under_scale_one():
    top = np.arange(0, 0x7F80, dtype=np.uint32)[:, None] << 16
    x = (top | np.array([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF], np.uint32)).view(np.float32)
    x = np.where(np.abs(x) < TINY, 0, x).astype(np.float32)
    values, _ = quantize(np.concatenate([x, -x]), np.ones((1, 1), np.float32), block=(2 * x.shape[0], 6))
    expected = oracle_codes(np.concatenate([x, -x]), np.float32(1))
    np.testing.assert_array_equal(bits(values), bits(expected))


@CALLS
def test_scales_are_amax_over_448_by_ieee_division(call):
    x = random_floats(np.random.default_rng(12), (1000, 1000))
    x[0, :6] = [448 * TINY, np.nextafter(448 * TINY, np.float32(0)), 448, -7, TINY, np.finfo(np.float32).max]
    _, scale = call(lambda x: quantize(x, block=(1, 1)))(x)
    with np.errstate(under="ignore"):
        expected = np.abs(x) / np.float32(448)
    np.testing.assert_array_equal(scale, np.where(expected < TINY, 1, expected))
    assert expected[0, 1] < TINY <= expected[0, 0]


@CALLS
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block", BLOCKS)
def test_quantize_equals_numpy_in_codes_and_scales(call, dtype, block):
    rng = np.random.default_rng(13)
    x = (rng.standard_normal((3, 200, 300)) * np.exp2(rng.uniform(-6, 6, (3, 200, 1)))).astype(np.float32).astype(dtype)
    values, scale = call(lambda x: quantize(x, block=block))(x)
    expected_values, expected_scale = oracle_quantize(x, block)
    assert_same_bits(scale, expected_scale)
    np.testing.assert_array_equal(bits(values), bits(expected_values))


@settings(max_examples=15, deadline=None)
@given(st.data())
def test_quantize_any_shape_equals_numpy(data):
    block = data.draw(st.sampled_from([(4, 8), (16, 16), (1, 3)]))
    parts = data.draw(st.integers(1, 3))
    shape = (*data.draw(st.lists(st.integers(1, 3), max_size=2)), data.draw(st.integers(1, 40)))
    shape = (*shape, parts * data.draw(st.integers(1, 20)))
    dtype = data.draw(st.sampled_from(DTYPES))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    x = (rng.standard_normal(shape) * rng.choice([0, 1e-3, 1, 100], shape)).astype(np.float32).astype(dtype)
    values, scale = quantize(x, block=block, parts=parts)
    expected_values, expected_scale = oracle_quantize(x, block, parts)
    assert_same_bits(scale, expected_scale)
    np.testing.assert_array_equal(bits(values), bits(expected_values))


@CALLS
@pytest.mark.parametrize("dtype", [np.float32, BF16])
def test_source_scales_bring_back_every_code(call, dtype):
    rng = np.random.default_rng(14)
    scale = np.concatenate([random_scales(rng, (9000, 1)), random_scales(rng, (3000, 1), low=-110, high=110)])
    codes = np.broadcast_to(FINITE, (scale.size, FINITE.size)).copy().view(E4M3)
    weights = oracle_dequantize(codes, scale, dtype, (1, 256))
    values, kept = call(lambda x, s: quantize(x, s, block=(1, 256)))(weights, scale)
    np.testing.assert_array_equal(bits(values), bits(codes))
    np.testing.assert_array_equal(kept, scale)


def test_negative_scales_bring_back_every_code():
    codes = FINITE.reshape(1, -1).view(E4M3)
    scale = np.full((1, 1), -3e-4, np.float32)
    values, _ = quantize(dequantize(codes, scale, block=(1, 256)), scale, block=(1, 256))
    np.testing.assert_array_equal(bits(values), bits(codes))


def test_values_beyond_the_largest_code_saturate():
    x = np.array([[448, 463, 464, 480, 1e30, -448, -465, -1e38]], np.float32)
    values, _ = quantize(x, np.ones((1, 1), np.float32))
    np.testing.assert_array_equal(np.asarray(values).astype(np.float32), [[448] * 5 + [-448] * 3])
    values, _ = quantize(np.float32([[3e38, -3e38]]), np.full((1, 1), TINY))
    np.testing.assert_array_equal(np.asarray(values).astype(np.float32), [[FP8_MAX, -FP8_MAX]])


def test_largest_value_of_a_block_becomes_the_largest_code():
    x = np.random.default_rng(15).standard_normal((64, 64)).astype(np.float32)
    values, _ = quantize(x, block=(8, 8))
    largest = np.abs(np.asarray(values).astype(np.float32)).reshape(8, 8, 8, 8).max((1, 3))
    np.testing.assert_array_equal(largest, 448)


@CALLS
@pytest.mark.parametrize("dtype", DTYPES)
def test_zero_blocks_get_scale_one_and_zeros_keep_their_sign(call, dtype):
    x = np.zeros((2, 4), dtype)
    x[1] = -0.0
    values, scale = call(lambda x: quantize(x, block=(2, 2)))(x)
    np.testing.assert_array_equal(scale, [[1, 1]])
    np.testing.assert_array_equal(bits(values), [[0] * 4, [0x80] * 4])


def test_block_too_small_for_a_normal_scale_counts_as_zero():
    x = np.array([[TINY, -400 * TINY, TINY, 449 * TINY]], np.float32)
    values, scale = quantize(x, block=(1, 2))
    np.testing.assert_array_equal(scale, [[1, np.float32(449 * TINY) / np.float32(448)]])
    np.testing.assert_array_equal(bits(values)[0, :2], [0, 0x80])
    np.testing.assert_array_equal(bits(values)[0, 3], 0x7E)


def test_bfloat16_input_made_in_the_same_program_is_taken_as_rounded():
    x = np.random.default_rng(16).standard_normal((128, 256)).astype(np.float32)
    got = jax.jit(lambda x: quantize((x * 3).astype(jnp.bfloat16)))(x)
    expected = oracle_quantize((x * np.float32(3)).astype(BF16), (128, 128))
    for g, e in zip(got, expected, strict=True):
        np.testing.assert_array_equal(bits(g), bits(e))


def primitives(jaxpr):
    for equation in jaxpr.eqns:
        yield equation
        for inner in jaxprs_in_params(equation.params):
            yield from primitives(inner)


def test_nothing_of_full_size_is_divided_since_gpus_do_not_divide_exactly():
    shape = (2, 256, 256)
    traced = jax.make_jaxpr(lambda x: (quantize(x), requantize(x, quantize(x)[1], block=(128, 128))))(
        jax.ShapeDtypeStruct(shape, jnp.float32)
    )
    sizes = [e.outvars[0].aval.size for e in primitives(traced.jaxpr) if e.primitive.name == "div"]
    assert sizes
    assert max(sizes) == 2 * 2 * 2


# --- what cannot be quantised


@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("given_scale", [False, True])
def test_nan_and_infinity_are_refused_with_count_and_place(poison, dtype, given_scale):
    x = np.ones((2, 4, 8), dtype)
    x[1, 2, 3] = x[1, 3, 7] = poison
    with pytest.raises(NumericError, match=r"2 values are NaN or infinite\n.* at index \[1, 2, 3\]"):
        quantize(x, np.ones((2, 1, 2), np.float32) if given_scale else None, block=(4, 4))


@pytest.mark.parametrize("scale", [np.nan, np.inf, 0, 1e-40])
def test_given_scale_that_is_no_normal_number_is_refused(scale):
    scales = np.array([[1, scale]], np.float32)
    with pytest.raises(NumericError, match=r"1 scales are NaN, infinite, zero or denormal\n.*\[0, 1\]"):
        quantize(np.ones((2, 4), np.float32), scales, block=(2, 2))
    values, _ = quantize(np.array([[1, 1, 0, -0.0]], np.float32), scales, block=(2, 2))
    np.testing.assert_array_equal(bits(values), [[0x38, 0x38, 0, 0x80]])


@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", DTYPES)
def test_under_a_trace_a_bad_block_comes_out_poisoned_and_no_other(poison, dtype):
    x = np.ones((4, 8), dtype)
    x[1, 5] = poison
    values, scale = jax.jit(lambda x: quantize(x, block=(4, 4)))(x)
    np.testing.assert_array_equal(np.isnan(scale), [[False, True]])
    np.testing.assert_array_equal(np.isnan(np.asarray(values).astype(np.float32)), [[False] * 4 + [True] * 4] * 4)
    values, _ = jax.jit(lambda x, s: quantize(x, s, block=(4, 4)))(x, np.ones((1, 2), np.float32))
    np.testing.assert_array_equal(
        np.isnan(np.asarray(values).astype(np.float32)), np.asarray(x).astype(np.float32) != 1
    )


def test_concrete_arrays_inside_a_trace_do_not_raise():
    x = np.full((2, 2), np.nan, np.float32)
    assert np.isnan(jax.jit(lambda: quantize(x)[1])()).all()


@pytest.mark.parametrize(
    ("x", "scale", "message"),
    [
        (np.ones((4, 4), np.float64), None, "dtype of weights"),
        (np.ones(4, np.float32), None, "not a matrix"),
        (np.ones((4, 4), np.float32), np.ones((2, 1), np.float32), "do not fit"),
        (np.ones((4, 4), np.float32), np.ones((1, 1), np.float16), "dtype of scales"),
    ],
)
def test_weights_that_do_not_fit_are_refused(x, scale, message):
    with pytest.raises(LayoutError, match=message):
        quantize(x, scale)
