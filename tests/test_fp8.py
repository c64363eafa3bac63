"""Codes and scales to floats, bit for bit as numpy has it."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fp8_cases import (
    ALL_CODES,
    BF16,
    BLOCKS,
    CALLS,
    DTYPES,
    E4M3,
    assert_same_bits,
    oracle_dequantize,
    random_codes,
    random_scales,
)
from helpers import bits
from hypothesis import given, settings
from hypothesis import strategies as st

from minimax_jax.errors import LayoutError
from minimax_jax.ops.checks import grid_shape
from minimax_jax.ops.fp8 import dequantize


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
