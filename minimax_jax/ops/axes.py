"""Axes in another order, joined and taken apart: every bit stays what it was. For numpy arrays, JAX arrays, tracers."""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np

from minimax_jax.errors import LayoutError, Problem
from minimax_jax.ops.checks import Array
from minimax_jax.ops.experts import stack


def rearrange(
    array: Array, *, split: tuple[int, ...], order: tuple[int, ...], shape: tuple[int, ...], apart: bool
) -> list[Array]:
    """Take the axes of an array apart, order them anew, and join them.

    Args:
        array: any shape of the size of `split`.
        split: sizes of all axes.
        order: these axes in their new order.
        shape: shape of each result.
        apart: whether the first of `order` is taken off, with a result for each of its places.

    Returns:
        One array of `shape`, or several: copies, or views of a numpy array where its memory allows.
    """
    moved = array.reshape(split).transpose(order)
    return [piece.reshape(shape) for piece in moved] if apart else [moved.reshape(shape)]


def restore(
    arrays: Sequence[Array], *, split: tuple[int, ...], order: tuple[int, ...], apart: bool, shape: tuple[int, ...]
) -> Array:
    """The inverse of `rearrange`.

    Args:
        arrays: its results.
        split: as there.
        order: as there.
        apart: as there.
        shape: shape of the array that it was given.
    """
    sizes = tuple(split[axis] for axis in order)
    if math.prod(sizes) != sum(math.prod(array.shape) for array in arrays):
        raise ValueError(f"arrays of {[array.shape for array in arrays]} are not those of axes {sizes}")
    joined = stack_along(arrays, 0) if apart else arrays[0]
    return joined.reshape(sizes).transpose(tuple(np.argsort(order).tolist())).reshape(shape)


def stack_along(arrays: Sequence[Array], axis: int) -> Array:
    """Arrays of one shape and dtype along a new axis, every bit as it was: a copy, by numpy where all are numpy's."""
    if len({np.dtype(array.dtype) for array in arrays}) > 1:
        dtypes = sorted({np.dtype(array.dtype).name for array in arrays})
        raise LayoutError(Problem(what="arrays of several dtypes cannot be stacked", got=", ".join(dtypes)))
    if all(isinstance(array, np.ndarray) for array in arrays):
        stacked: Array = np.stack(arrays, axis)
        return stacked
    return jnp.moveaxis(stack(arrays), 0, axis)
