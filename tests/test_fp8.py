"""The codec against numpy and ml_dtypes, bit for bit."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.extend.core import jaxprs_in_params

from minimax_jax.errors import LayoutError, NumericError
from minimax_jax.ops.fp8 import FP8, FP8_MAX, dequantize, grid_shape, quantize, requantize

E4M3 = ml_dtypes.float8_e4m3fn
BF16 = ml_dtypes.bfloat16
TINY = np.finfo(np.float32).tiny
DTYPES = (np.float32, BF16, np.float16)
BLOCKS = ((128, 128), (1, 32), (16, 16), (8, 24))
ALL_CODES = np.arange(256, dtype=np.uint8)
FINITE = ALL_CODES[(ALL_CODES & 0x7F) != 0x7F]
CALLS = pytest.mark.parametrize("call", [lambda f: f, jax.jit], ids=["eager", "jit"])


def bits(x) -> np.ndarray:
    x = np.asarray(x)
    return x.view(f"u{x.dtype.itemsize}")


def assert_same_bits(got, expected):
    got, expected = np.asarray(got), np.asarray(expected)
    assert got.shape == expected.shape
    assert got.dtype == expected.dtype
    nan = np.isnan(expected.astype(np.float32))
    np.testing.assert_array_equal(np.isnan(got.astype(np.float32)), nan)
    np.testing.assert_array_equal(np.where(nan, 0, bits(got)), np.where(nan, 0, bits(expected)))


def spread(grid, shape, block, offset=(0, 0), parts=1):
    part = shape[-1] // parts
    rows, cols = offset[0] + np.arange(shape[-2]), offset[1] + np.arange(shape[-1])
    in_part = cols if parts == 1 else cols % part
    col_blocks = in_part // block[1] + (cols // part * -(-part // block[1]) if parts > 1 else 0)
    return grid[..., rows[:, None] // block[0], col_blocks]


def oracle_dequantize(codes, scale, dtype, block, offset=(0, 0), parts=1):
    with np.errstate(over="ignore"):
        return (codes.view(E4M3).astype(np.float32) * spread(scale, codes.shape, block, offset, parts)).astype(dtype)


def oracle_codes(x, full_scale):
    with np.errstate(over="ignore", under="ignore"):
        return np.clip(x.astype(np.float32) / full_scale, -448, 448).astype(E4M3)


def oracle_quantize(x, block, parts=1):
    x = x.astype(np.float32)
    scale = np.empty(grid_shape(x.shape, block, parts=parts), np.float32)
    part, per_part = x.shape[-1] // parts, scale.shape[-1] // parts
    for r, c in np.ndindex(scale.shape[-2:]):
        p, c_in = divmod(c, per_part)
        cols = slice(p * part + c_in * block[1], min(p * part + (c_in + 1) * block[1], (p + 1) * part))
        amax = np.abs(x[..., r * block[0] : (r + 1) * block[0], cols]).max((-2, -1))
        scale[..., r, c] = amax / np.float32(448)
    scale[scale < TINY] = 1
    return oracle_codes(x, spread(scale, x.shape, block, parts=parts)), scale


def random_codes(rng, shape, among=FINITE):
    return rng.choice(among, shape).view(E4M3)


def random_scales(rng, shape, low=-13, high=-7):
    return np.exp2(rng.uniform(low, high, shape)).astype(np.float32)


def random_floats(rng, count):
    """Normal float32 of every magnitude and sign."""
    exponent = rng.integers(1, 255, count, dtype=np.uint32)
    return (
        (rng.integers(0, 2**23, count, dtype=np.uint32) | exponent << 23 | rng.integers(0, 2, count) << 31)
        .astype(np.uint32)
        .view(np.float32)
    )


# --- dequantize


@CALLS
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_code_under_many_scales_equals_numpy(call, dtype):
    scale = random_scales(np.random.default_rng(0), (3000, 1), low=-60, high=60)
    scale[:8, 0] = [1, 2.0**-117, 2.0**-116 * 1.5, 2.0**119, 1e-4, 448, 1 / 448, 3.3895e38]
    codes = np.broadcast_to(ALL_CODES, (3000, 256)).copy().view(E4M3)
    got = call(lambda v, s: dequantize(v, s, dtype, block=(1, 256)))(codes, scale)
    assert_same_bits(got, oracle_dequantize(codes, scale, dtype, (1, 256)))


def test_subnormal_codes_are_not_flushed_and_zero_keeps_its_sign():
    codes = np.array([[0, 1, 2, 7, 8, 0x80, 0x81]], np.uint8).view(E4M3)
    got = np.asarray(dequantize(codes, np.ones((1, 1), np.float32), jnp.float32))
    np.testing.assert_array_equal(got, [[0, 2**-9, 2**-8, 7 * 2**-9, 2**-6, 0, -(2**-9)]])
    np.testing.assert_array_equal(np.signbit(got), [[0, 0, 0, 0, 0, 1, 1]])


@pytest.mark.parametrize("dtype", DTYPES)
def test_both_nan_codes_stay_nan(dtype):
    codes = np.array([[0x7F, 0xFF, 0x7E, 0xFE]], np.uint8).view(E4M3)
    got = np.asarray(dequantize(codes, np.full((1, 1), 2.0**-8, np.float32), dtype)).astype(np.float32)
    np.testing.assert_array_equal(np.isnan(got), [[True, True, False, False]])


@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_scale_of_any_bits_gives_nan(dtype):
    scale = np.array([[0x7FFFFFFF], [0xFFFFFFFF], [0x7F800001], [0x7FC00000]], np.uint32).view(np.float32)
    assert np.isnan(np.asarray(dequantize(np.ones((4, 4), E4M3), scale, dtype, block=(1, 4))).astype(np.float32)).all()


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("shape", [(256, 384), (3, 2, 130, 200), (1, 5), (2, 129, 1)])
@pytest.mark.parametrize("dtype", [np.float32, BF16])
def test_any_block_ragged_edges_and_leading_axes(block, shape, dtype):
    rng = np.random.default_rng(1)
    codes, scale = random_codes(rng, shape, ALL_CODES), random_scales(rng, grid_shape(shape, block))
    assert_same_bits(dequantize(codes, scale, dtype, block=block), oracle_dequantize(codes, scale, dtype, block))


@pytest.mark.parametrize("parts", [2, 3])
@pytest.mark.parametrize("part", [16, 20, 5])
def test_grid_starts_anew_at_each_part(parts, part):
    rng, block = np.random.default_rng(2), (8, 16)
    codes = random_codes(rng, (2, 19, parts * part))
    scale = random_scales(rng, grid_shape(codes.shape, block, parts=parts))
    got = dequantize(codes, scale, jnp.float32, block=block, parts=parts)
    alone = [
        dequantize(c, s, jnp.float32, block=block)
        for c, s in zip(np.split(codes, parts, -1), np.split(scale, parts, -1), strict=True)
    ]
    assert_same_bits(got, np.concatenate(alone, -1))
    assert_same_bits(got, oracle_dequantize(codes, scale, np.float32, block, parts=parts))


def test_default_is_bfloat16_in_blocks_of_128():
    rng = np.random.default_rng(3)
    codes, scale = random_codes(rng, (256, 128)), random_scales(rng, (2, 1))
    assert_same_bits(dequantize(codes, scale), oracle_dequantize(codes, scale, BF16, (128, 128)))


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_slice_of_a_matrix_equals_slice_of_the_result(data):
    block = data.draw(st.sampled_from([(4, 8), (16, 16), (1, 3)]))
    rows, cols = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 40))
    r0, c0 = data.draw(st.integers(0, rows - 1)), data.draw(st.integers(0, cols - 1))
    r1, c1 = data.draw(st.integers(r0 + 1, rows)), data.draw(st.integers(c0 + 1, cols))
    rng = np.random.default_rng(rows * 41 + cols)
    codes, scale = random_codes(rng, (rows, cols)), random_scales(rng, grid_shape((rows, cols), block))
    full = oracle_dequantize(codes, scale, BF16, block)
    got = dequantize(codes[r0:r1, c0:c1], scale, block=block, offset=(r0, np.int64(c0)))
    assert_same_bits(got, full[r0:r1, c0:c1])


@pytest.mark.parametrize("size", [(9, 7), (16, 8), (5, 20), (33, 25)])
def test_every_slice_under_traced_offsets(size):
    rng, block, shape = np.random.default_rng(4), (16, 8), (37, 27)
    codes, scale = random_codes(rng, shape), random_scales(rng, grid_shape(shape, block))
    full = oracle_dequantize(codes, scale, BF16, block)
    run = jax.jit(lambda v, r, c: dequantize(v, scale, block=block, offset=(r, c)))
    for r in range(shape[0] - size[0] + 1):
        for c in range(shape[1] - size[1] + 1):
            cut = np.s_[r : r + size[0], c : c + size[1]]
            np.testing.assert_array_equal(bits(run(codes[cut], r, c)), bits(full[cut]))


def test_one_traced_and_one_fixed_offset_with_leading_axes_and_parts():
    rng, block, shape = np.random.default_rng(5), (16, 8), (3, 50, 20)
    codes, scale = random_codes(rng, shape), random_scales(rng, grid_shape(shape, block, parts=2))
    got = jax.jit(lambda r: dequantize(codes[:, 21:43], scale, block=block, offset=(r, 0), parts=2))(21)
    assert_same_bits(got, oracle_dequantize(codes, scale, BF16, block, parts=2)[:, 21:43])


def test_shards_in_shard_map_find_their_scales_by_their_own_offset():
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    rng = np.random.default_rng(6)
    codes, scale = random_codes(rng, (1536, 128)), random_scales(rng, (12, 1))

    def shard(v, s):
        return dequantize(v, s, offset=(jax.lax.axis_index("x") * v.shape[0], 0))

    run = jax.shard_map(shard, mesh=mesh, in_specs=(jax.P("x"), jax.P()), out_specs=jax.P("x"))
    assert_same_bits(jax.jit(run)(codes, scale), oracle_dequantize(codes, scale, BF16, (128, 128)))


def test_traced_offset_beyond_the_grid_gives_nan_not_the_last_scale():
    codes = np.full((8, 8), 0x38, np.uint8).view(E4M3)
    run = jax.jit(lambda r: dequantize(codes, np.ones((2, 1), np.float32), jnp.float32, block=(8, 8), offset=(r, 0)))
    got = np.asarray(run(12))
    np.testing.assert_array_equal(got[:4], 1)
    assert np.isnan(got[4:]).all()
    assert np.isnan(np.asarray(run(400))).all()


def test_bfloat16_rounding_survives_a_cast_back_in_the_same_program():
    rng = np.random.default_rng(7)
    codes, scale = random_codes(rng, (256, 256)), random_scales(rng, (2, 2))
    got = jax.jit(lambda v, s: dequantize(v, s).astype(jnp.float32))(codes, scale)
    assert_same_bits(got, oracle_dequantize(codes, scale, BF16, (128, 128)).astype(np.float32))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_weights_have_a_derivative_by_their_scales(dtype):
    codes = random_codes(np.random.default_rng(8), (16, 16))
    total = jax.grad(lambda s: dequantize(codes, s, dtype, block=(8, 16)).astype(jnp.float32).sum())
    expected = codes.astype(np.float32).reshape(2, -1).sum(1, keepdims=True)
    np.testing.assert_allclose(total(np.ones((2, 1), np.float32)), expected)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"scale_inv": np.ones((2, 1), np.float32)}, "do not fit"),
        ({"scale_inv": np.ones((1,), np.float32)}, "do not fit"),
        ({"scale_inv": np.ones((1, 1), BF16)}, "dtype of scales"),
        ({"values": np.zeros((4, 4), np.uint8)}, "dtype of codes"),
        ({"values": np.zeros((4,), E4M3)}, "not a matrix"),
        ({"dtype": np.int8}, "dtype of weights"),
        ({"block": (0, 4)}, "positive"),
        ({"parts": 3}, "unequal parts"),
        ({"offset": (1, 0)}, "rows beyond"),
        ({"offset": (0, -1)}, "columns beyond"),
        ({"offset": (0, 2), "parts": 2, "scale_inv": np.ones((1, 2), np.float32)}, "several parts"),
        ({"offset": (0, 0), "scale_inv": np.ones((2, 1, 1), np.float32)}, "do not fit"),
    ],
)
def test_what_does_not_fit_is_refused(arguments, message):
    good = {"values": np.zeros((4, 4), E4M3), "scale_inv": np.ones((1, 1), np.float32), "block": (4, 4)}
    with pytest.raises(LayoutError, match=message):
        dequantize(**(good | arguments))


def test_all_problems_of_a_call_are_told_at_once():
    with pytest.raises(LayoutError) as caught:
        dequantize(np.zeros((4, 4), np.int8), np.ones((1, 1), np.int8), np.int8)
    assert len(caught.value.problems) == 3


# --- quantize


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


# --- requantize


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
