"""Grids with one number for each block of a matrix: spread over the elements, and the largest magnitudes."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from minimax_jax.ops.checks import Block, Offset, Start
from minimax_jax.ops.rounding import bits_of


def spread(grid: jax.Array, shape: tuple[int, ...], block: Block, parts: int, offset: Offset = (0, 0)) -> jax.Array:
    """A grid repeated over its blocks: for each element of a weight, or of a slice of it, the number of its block.

    Columns first: the other way round, a TPU writes the repeated grid out at full size, three times.

    Args:
        grid: [..., block rows, block cols], of any dtype.
        shape: of the result, [..., rows, cols].
        block: rows and columns of one block.
        parts: equal parts of the last axis, each with its own grid.
        offset: row and column of the first element in the matrix of the grid; integers, or traced scalars if the grid
            is of floats: what they put behind its end comes out as NaN.

    Returns:
        `shape`, of the grid's dtype; a copy.
    """
    cols, lead = shape[-1], grid.shape[:-1]
    if parts == 1:
        grid = _spread_axis(grid, grid.ndim - 1, cols, block[1], offset[1])
    else:
        apart = grid.reshape(*lead, parts, grid.shape[-1] // parts)
        grid = _spread_axis(apart, grid.ndim, cols // parts, block[1], 0).reshape(*lead, cols)
    return _spread_axis(grid, grid.ndim - 2, shape[-2], block[0], offset[0])


def _spread_axis(grid: jax.Array, axis: int, size: int, block: int, offset: Start) -> jax.Array:
    """Repeat along one axis. A traced start is met by a choice between neighbours: a dynamic slice would not fuse."""
    if isinstance(offset, int):
        first, skip = divmod(offset, block)
        grid = lax.slice_in_dim(grid, first, first - (-(skip + size) // block), axis=axis)
        return lax.slice_in_dim(jnp.repeat(grid, block, axis), skip, skip + size, axis=axis)
    count = -(-size // block)
    beyond = [(0, count + 1 if a == axis else 0) for a in range(grid.ndim)]
    grid = jnp.pad(grid, beyond, constant_values=np.float32(np.nan))
    grid = lax.dynamic_slice_in_dim(grid, offset // block, count + 1, axis)
    near, far = (jnp.repeat(lax.slice_in_dim(grid, i, i + count, axis=axis), block, axis) for i in (0, 1))
    position = lax.broadcasted_iota(jnp.int32, near.shape, axis) % block
    repeated = jnp.where(position + offset % block < block, near, far)
    return lax.slice_in_dim(repeated, 0, size, axis=axis)


def block_amax(x: jax.Array, block: Block, parts: int) -> jax.Array:
    """Largest magnitude of each block.

    Rows first, since splitting only the row axis costs no change of layout, and what is left is small.

    Args:
        x: float32, bfloat16 or float16 [..., rows, cols].
        block: rows and columns of one block.
        parts: equal parts of the last axis, each with its own grid.

    Returns:
        float32 [..., block rows, block cols]; NaN or infinity where there is one in the block.
    """
    *lead, _, cols = x.shape
    x = _pad(x, -2, block[0]).reshape(*lead, -1, block[0], cols)
    size: jax.Array = lax.platform_dependent(x, cpu=_row_amax_by_bits, default=_row_amax)
    size = _pad(size.reshape(*size.shape[:-1], parts, cols // parts), -1, block[1])
    size = size.reshape(*size.shape[:-2], -1, block[1]).max(-1)
    return lax.bitcast_convert_type(size, x.dtype).astype(jnp.float32)


def _row_amax(x: jax.Array) -> jax.Array:
    """Bits of the largest magnitude of each column of blocks.

    Maximum and minimum, because a TPU does not fuse `abs`, or anything else, into the reduction but writes it out.
    """
    return bits_of(jnp.abs(jnp.maximum(x.max(-2), -x.min(-2))))


def _row_amax_by_bits(x: jax.Array) -> jax.Array:
    """The same by the bits without the sign, which order numbers, infinity and NaN: XLA's CPU maximum loses NaN."""
    return (bits_of(x) << 1).max(-2) >> 1


def _pad(x: jax.Array, axis: int, multiple: int) -> jax.Array:
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, -x.shape[axis] % multiple)
    return jnp.pad(x, widths)
