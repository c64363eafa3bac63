"""Block-scaled FP8: codes [..., rows, cols] in float8_e4m3fn, one float32 scale for each block of them.

A scale multiplies: `weight = float32(code) * scale_inv[row // block_rows, col // block_cols]`, as in the published
MiniMax-M2 checkpoints (`weight_scale_inv`, `weight_block_size`).

Results are the same bit for bit in eager calls and under `jit`, on any backend whose float32 products and sums are
IEEE: see `minimax_jax.ops.rounding` for how.

Small numbers: XLA flushes float32 denormals on CPU and TPU. The exact results are promised where every value of `x`,
every scale and every product `code * scale` is zero or a normal float32. A block whose `amax / 448` is below the
smallest normal float32 (1.2e-38) counts as all zero: scale 1.0, codes +-0.

Parts: a matrix whose last axis is several matrices side by side, such as a grouped gate and up [experts, hidden,
2*inter], has a grid of blocks that starts anew at each of them. `parts` says how many equal parts there are; it makes
a difference only when a part is not a whole number of blocks.
"""

from __future__ import annotations

import operator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike

from minimax_jax.errors import LayoutError, raise_if
from minimax_jax.ops import checks
from minimax_jax.ops.blocks import block_amax, spread
from minimax_jax.ops.checks import Array, Block, Offset, Start
from minimax_jax.ops.rounding import (
    barrier,
    bits_of,
    code_bits,
    decode,
    limit_of,
    narrow,
    scale_of_amax,
    settle,
    significand_of,
    usable,
)

FP8 = jnp.float8_e4m3fn
FP8_MAX = 448.0


def dequantize(
    values: Array,
    scale_inv: Array,
    dtype: DTypeLike = jnp.bfloat16,
    *,
    block: Block = (128, 128),
    offset: Offset | None = None,
    parts: int = 1,
) -> jax.Array:
    """Weights of FP8 codes, or of any slice of them: `dtype(float32(code) * scale)`, bit for bit.

    Args:
        values: codes, float8_e4m3fn [..., rows, cols]. NaN codes become NaN.
        scale_inv: float32 [..., block rows, block cols]: the grid of `values` or, with `offset`, of a larger matrix.
        dtype: float32, bfloat16 or float16. Inside a larger `jit` the first two fuse with what follows; float16 is
            kept apart from it by a barrier.
        block: rows and columns of one block.
        offset: row and column of `values[..., 0, 0]` in the matrix that `scale_inv` describes; integers or traced
            scalars (the start of a device's shard). None: `values` is all of that matrix. What a traced offset puts
            beyond the end of the grid comes out as NaN, since it cannot be checked.
        parts: equal parts of the last axis of `values`, each with its own grid. With more than one, the last axis must
            be whole (column offset 0); where parts are whole blocks, `parts=1` says the same and can be sliced.

    Returns:
        The weights, `dtype` [..., rows, cols]; a copy.

    Raises:
        LayoutError: wrong dtypes, or shapes that do not fit each other.

    Examples:
        >>> codes = jnp.array([[1.0, -448.0]], jnp.float8_e4m3fn)
        >>> mj.dequantize(codes, jnp.array([[0.5]])).tolist()
        [[0.5, -224.0]]
        >>> scales = jnp.array([[0.5], [0.25]])  # of a matrix of 256 rows
        >>> mj.dequantize(codes, scales, offset=(200, 0)).tolist()  # of which this is row 200
        [[0.25, -112.0]]
    """
    if offset is not None:
        offset = (_start(offset[0]), _start(offset[1]))
    problems = checks.scaled_problems(values, scale_inv, block, parts, offset) + checks.result_problems(dtype)
    raise_if(problems, LayoutError)
    fixed = offset is None or (isinstance(offset[0], int) and isinstance(offset[1], int))
    run = _dequantize_fixed if fixed else _dequantize_traced
    weights: jax.Array = run(values, scale_inv, offset, dtype=np.dtype(dtype), block=block, parts=parts)
    return weights


def quantize(
    x: Array, scale_inv: Array | None = None, *, block: Block = (128, 128), parts: int = 1
) -> tuple[jax.Array, jax.Array]:
    """FP8 codes and scales of weights.

    Without `scale_inv`, the scale of a block is `amax / 448` (IEEE division in float32), or 1.0 where that is zero or
    below the smallest normal float32. Codes are `x / scale` in float32, rounded to nearest even and saturated at
    +-448; zeros keep their sign.

    Args:
        x: weights, float32, bfloat16 or float16 [..., rows, cols].
        scale_inv: scales to use, float32 [..., block rows, block cols], or None to derive them. With the scales of
            the codes that a float32 or bfloat16 weight was made of, the same codes come back.
        block: rows and columns of one block.
        parts: equal parts of the last axis, each with its own grid.

    Returns:
        Codes, float8_e4m3fn [..., rows, cols], and their scales, float32.

    Raises:
        LayoutError: wrong dtypes, or shapes that do not fit each other.
        NumericError: NaN or infinity in `x`, or a given scale that is no normal number over values other than zero.
            Under a trace nothing can be raised: where scales are derived, the block gets a NaN scale and NaN codes
            (zeros stay zero); where they are given, the values concerned get NaN codes.

    Examples:
        >>> codes, scale_inv = mj.quantize(jnp.array([[1.0, -896.0]]))
        >>> codes.tolist(), scale_inv.tolist()
        ([[0.5, -448.0]], [[2.0]])
    """
    raise_if(checks.weight_problems(x, scale_inv, block, parts), LayoutError)
    if scale_inv is None:
        values, derived, bad = _quantize_by_amax(x, block=block, parts=parts)
        checks.raise_if_bad(bad, x)
        return values, derived
    values, bad = _quantize_by_scale(x, scale_inv, block=block, parts=parts)
    checks.raise_if_bad(bad, x, scale_inv)
    return values, jnp.asarray(scale_inv)


def requantize(
    x: Array, scale_inv: Array, *, block: Block = (128, 128), parts: int = 1
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """FP8 codes of weights that may have changed since they were dequantised.

    A matrix keeps its given scales when they reproduce it: `dequantize(quantize(x, s), s)` equals `x` in all bits,
    the sign of zero included. Any other matrix gets scales by amax, as from `quantize(x)`.

    Args:
        x: weights, float32, bfloat16 or float16 [..., rows, cols].
        scale_inv: the scales they had, float32 [..., block rows, block cols].
        block: rows and columns of one block.
        parts: equal parts of the last axis, each with its own grid.

    Returns:
        Codes, float8_e4m3fn [..., rows, cols]; scales, float32; and `kept`, bool [...]: which matrices kept theirs.

    Raises:
        LayoutError: wrong dtypes, or shapes that do not fit each other.
        NumericError: NaN or infinity in `x`. Under a trace: as in `quantize`.
    """
    raise_if(checks.weight_problems(x, scale_inv, block, parts), LayoutError)
    values, scales, kept, bad = _requantize(x, scale_inv, block=block, parts=parts)
    checks.raise_if_bad(bad, x)
    return values, scales, kept


def _start(offset: Start) -> Start:
    """Any kind of integer as an int; traced scalars as they are."""
    return offset if isinstance(offset, jax.Array) else operator.index(offset)


def _dequantize(
    values: jax.Array, scale_inv: jax.Array, offset: Offset | None, dtype: np.dtype[Any], block: Block, parts: int
) -> jax.Array:
    return narrow(decode(values) * spread(scale_inv, values.shape, block, parts, offset or (0, 0)), dtype)


_dequantize_fixed = jax.jit(_dequantize, static_argnames=("offset", "dtype", "block", "parts"))
_dequantize_traced = jax.jit(_dequantize, static_argnames=("dtype", "block", "parts"))


@partial(jax.jit, static_argnames=("block", "parts"))
def _quantize_by_amax(x: jax.Array, block: Block, parts: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    x = settle(x)
    scale_inv = scale_of_amax(block_amax(x, block, parts))
    return codes_by(x, scale_inv, block, parts), scale_inv, jnp.isnan(scale_inv).any()


@partial(jax.jit, static_argnames=("block", "parts"))
def _quantize_by_scale(x: jax.Array, scale_inv: jax.Array, block: Block, parts: int) -> tuple[jax.Array, jax.Array]:
    x = settle(x)
    bad = bits_of(block_amax(x, block, parts)) >= limit_of(scale_inv)
    return codes_by(x, scale_inv, block, parts), bad.any()


@partial(jax.jit, static_argnames=("block", "parts"))
def _requantize(
    x: jax.Array, scale_inv: jax.Array, block: Block, parts: int
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    x = settle(x)
    derived = scale_of_amax(block_amax(x, block, parts))
    back = _dequantize(codes_by(x, scale_inv, block, parts), scale_inv, None, x.dtype, block, parts)
    changed = (bits_of(back) ^ bits_of(x)).max(-2).max(-1) != 0
    kept = ~changed & ~jnp.isnan(derived).any((-2, -1))
    scales = jnp.where(kept[..., None, None], scale_inv, derived)
    return codes_by(x, scales, block, parts), scales, kept, jnp.isnan(derived).any()


def codes_by(x: jax.Array, scale_inv: jax.Array, block: Block, parts: int) -> jax.Array:
    """Codes of a settled `x / scale`. NaN where `x` is not finite, or not zero under a scale that is not normal."""
    limit = limit_of(scale_inv)
    scale = usable(scale_inv, limit)
    # The barrier has these computed once a block, not once an element.
    grids = barrier((scale, 1 / significand_of(scale), limit))
    scale, reciprocal, limit = (spread(grid, x.shape, block, parts) for grid in grids)
    code = code_bits(x.astype(jnp.float32), scale, reciprocal, limit)
    return lax.bitcast_convert_type(code.astype(jnp.uint8), FP8)
