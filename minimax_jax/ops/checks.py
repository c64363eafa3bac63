"""What can be wrong with codes, scales and weights: shapes and dtypes before the maths, numbers after it."""

from __future__ import annotations

from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from minimax_jax.errors import NumericError, Problem, raise_if

Array: TypeAlias = jax.Array | np.ndarray[Any, Any]
Block: TypeAlias = tuple[int, int]
Start: TypeAlias = int | jax.Array
Offset: TypeAlias = tuple[Start, Start]

_CODES = (np.dtype(jnp.float8_e4m3fn),)
_SCALES = (np.dtype(np.float32),)
_WEIGHTS = (np.dtype(np.float32), np.dtype(jnp.bfloat16), np.dtype(np.float16))


def grid_shape(shape: tuple[int, ...], block: Block, *, parts: int = 1) -> tuple[int, ...]:
    """Shape of the scales of a weight.

    Args:
        shape: of the weight, [..., rows, cols]; `cols` is a multiple of `parts`.
        block: rows and columns of one block.
        parts: equal parts of the last axis, each with its own grid.

    Returns:
        [..., ceil(rows / block_rows), parts * ceil(cols / parts / block_cols)].
    """
    *lead, rows, cols = shape
    return (*lead, -(-rows // block[0]), parts * -(-(cols // parts) // block[1]))


def scaled_problems(
    values: Array, scale_inv: Array, block: Block, parts: int, offset: Offset | None = None
) -> list[Problem]:
    """What keeps `scale_inv` from being the scales of the codes `values`, or of the matrix they are a slice of."""
    problems = _dtype_problems("codes", values.dtype, _CODES) + _dtype_problems("scales", scale_inv.dtype, _SCALES)
    problems += _block_problems(values.shape, block, parts)
    if problems or offset is None:
        return problems or _grid_problems(values.shape, scale_inv.shape, block, parts)
    return _slice_problems(values.shape, scale_inv.shape, block, parts, offset)


def weight_problems(x: Array, scale_inv: Array | None, block: Block, parts: int) -> list[Problem]:
    """What keeps the weights `x` from being quantised, with the scales `scale_inv` if there are any."""
    problems = result_problems(x.dtype) + _block_problems(x.shape, block, parts)
    if scale_inv is not None:
        problems += _dtype_problems("scales", scale_inv.dtype, _SCALES)
    if problems or scale_inv is None:
        return problems
    return _grid_problems(x.shape, scale_inv.shape, block, parts)


def result_problems(dtype: DTypeLike) -> list[Problem]:
    """What keeps `dtype` from being the dtype of weights."""
    return _dtype_problems("weights", dtype, _WEIGHTS)


def raise_if_bad(bad: jax.Array, x: Array, scale_inv: Array | None = None) -> None:
    """Raise for values that have no code, unless `bad` is traced and so not known."""
    if isinstance(bad, jax.core.Tracer) or not bad:
        return
    x = np.asarray(x)
    problems = _value_problems("values are NaN or infinite", x, np.isfinite(x))
    if scale_inv is not None:
        scale_inv = np.asarray(scale_inv)
        normal = np.isfinite(scale_inv) & (np.abs(scale_inv) >= np.finfo(np.float32).tiny)
        problems += _value_problems("scales are NaN, infinite, zero or denormal", scale_inv, normal)
    raise_if(problems, NumericError)


def _dtype_problems(name: str, dtype: DTypeLike, allowed: tuple[np.dtype[Any], ...]) -> list[Problem]:
    if np.dtype(dtype) in allowed:
        return []
    expected = " or ".join(str(d) for d in allowed)
    return [Problem(what=f"unsupported dtype of {name}", expected=expected, got=str(np.dtype(dtype)))]


def _block_problems(shape: tuple[int, ...], block: Block, parts: int) -> list[Problem]:
    if len(shape) < 2:
        return [Problem(what="not a matrix", expected="shape [..., rows, cols]", got=f"shape {shape}")]
    if min(*block, parts) < 1:
        return [Problem(what="sides of a block and parts must be positive", got=f"block {block}, parts {parts}")]
    if shape[-1] % parts:
        return [Problem(what="unequal parts", expected=f"a last axis of {parts} equal parts", got=f"shape {shape}")]
    return []


def _grid_problems(shape: tuple[int, ...], grid: tuple[int, ...], block: Block, parts: int) -> list[Problem]:
    expected = grid_shape(shape, block, parts=parts)
    if grid == expected:
        return []
    what = f"the scales do not fit a weight of shape {shape} in blocks of {block}, parts {parts}"
    remedy = "check the block size; for a slice of a larger matrix pass its offset"
    return [Problem(what=what, expected=f"shape {expected}", got=f"shape {grid}", remedy=remedy)]


def _slice_problems(
    shape: tuple[int, ...], grid: tuple[int, ...], block: Block, parts: int, offset: Offset
) -> list[Problem]:
    if grid[:-2] != shape[:-2] or len(grid) < 2:
        expected = f"shape {(*shape[:-2], 'block rows', 'block cols')}"
        return [Problem(what="the scales do not fit the codes", expected=expected, got=f"shape {grid}")]
    axes = [("rows", shape[-2], offset[0], grid[-2] * block[0]), ("columns", shape[-1], offset[1], grid[-1] * block[1])]
    if parts > 1:
        whole = isinstance(offset[1], int) and offset[1] == 0
        if not whole or grid[-1] != grid_shape(shape, block, parts=parts)[-1]:
            remedy = "slice each part by itself, or pass parts=1 when every part is whole blocks"
            return [Problem(what="a slice of the last axis of a tensor of several parts", remedy=remedy)]
        axes.pop()
    return [
        Problem(what=f"{name} beyond the scales", expected=f"within 0 to {end}", got=f"{start} to {start + size}")
        for name, size, start, end in axes
        if isinstance(start, int) and not 0 <= start <= end - size
    ]


def _value_problems(what: str, array: np.ndarray[Any, Any], good: np.ndarray[Any, Any]) -> list[Problem]:
    count = good.size - np.count_nonzero(good)
    if not count:
        return []
    first = tuple(int(i) for i in np.unravel_index(good.argmin(), good.shape))
    return [Problem(what=f"{count} {what}", got=f"{array[first]} at index {list(first)}, the first of them")]
