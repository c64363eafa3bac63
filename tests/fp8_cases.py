"""The codec of FP8 in plain numpy, and random codes, scales and floats for it."""

from __future__ import annotations

import jax
import ml_dtypes
import numpy as np
import pytest
from helpers import bits

from minimax_jax.ops.checks import grid_shape

E4M3 = ml_dtypes.float8_e4m3fn
BF16 = ml_dtypes.bfloat16
TINY = np.finfo(np.float32).tiny
DTYPES = (np.float32, BF16, np.float16)
BLOCKS = ((128, 128), (1, 32), (16, 16), (8, 24))
MINIMAX, BLOCK = [(192, 384), (384, 192), (768, 384), (128, 384), (384, 768)], (16, 16)
"""The published matrices, sides and blocks divided by eight: 192 rows over 8 ranks are 24, as 1536 over 8 are 192."""

ALL_CODES = np.arange(256, dtype=np.uint8)
FINITE = ALL_CODES[(ALL_CODES & 0x7F) != 0x7F]
CALLS = pytest.mark.parametrize("call", [lambda f: f, jax.jit], ids=["eager", "jit"])


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


def random_matrix(rng, shape, block):
    """Codes and scales of one matrix."""
    grid = tuple(-(-size // side) for size, side in zip(shape, block, strict=True))
    return random_codes(rng, shape), rng.lognormal(-8, 1, grid).astype(np.float32)
