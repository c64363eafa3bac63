"""Float weights to FP8 inside a job: with their source scales where those reproduce them, and word of which did."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from minimax_jax.errors import NumericError, raise_if
from minimax_jax.layout.specs import Entry
from minimax_jax.layout.table import SCALE_SUFFIX
from minimax_jax.leaves import native_blocks, poisoned, scales_by_key
from minimax_jax.ops import host_matrices
from minimax_jax.ops.checks import Array
from minimax_jax.ops.fp8 import quantize, requantize
from minimax_jax.ops.scaled import BlockScaled


def quantize_leaf(entry: Entry, leaf: Array, source: Array | None) -> tuple[BlockScaled, Mapping[str, bool]]:
    """The FP8 form of a native leaf of floats.

    Args:
        entry: which leaf.
        leaf: floats, shaped as `entry.shape`.
        source: the block scales it had, shaped as `entry.grid`. A weight that they reproduce in all bits keeps them;
            any other gets scales by amax, as all do without `source`.

    Returns:
        New codes and scales, and by Hugging Face name, which weights have kept their source scales.

    Raises:
        NumericError: weights that hold NaN or infinity, by Hugging Face name.
    """
    block, parts = native_blocks(entry)
    done = host_matrices.quantize(leaf, source, block=block, parts=parts)
    scaled, kept = _quantize(leaf, source, block=block, parts=parts) if done is None else done
    scales = scales_by_key(entry, np.asarray(scaled.scale_inv))
    raise_if(poisoned(entry, leaf, {key + SCALE_SUFFIX: grid for key, grid in scales.items()}), NumericError)
    return scaled, dict(zip(itertools.chain(*entry.keys), map(bool, np.asarray(kept).flat), strict=True))


@functools.partial(jax.jit, static_argnames=("block", "parts"))
def _quantize(
    leaf: Array, source: Array | None, *, block: tuple[int, int], parts: int
) -> tuple[BlockScaled, jax.Array]:
    """The parts by themselves, so that a change in one of them leaves the other's scales alone."""
    apart = _apart(leaf, parts)
    if source is None:
        values, scales = quantize(apart, block=block)
        kept = jnp.zeros(apart.shape[:-2], bool)
    else:
        values, scales, kept = requantize(apart, _apart(source, parts), block=block)
    return BlockScaled(values=_joined(values), scale_inv=_joined(scales), block=block, parts=parts), kept


def _apart(tensor: Array, parts: int) -> jax.Array:
    """`[..., rows, parts*cols]` to `[..., parts, rows, cols]`."""
    return jnp.moveaxis(tensor.reshape(*tensor.shape[:-1], parts, -1), -2, -3)


def _joined(tensor: jax.Array) -> jax.Array:
    """The inverse of `_apart`."""
    joined = jnp.moveaxis(tensor, -3, -2)
    return joined.reshape(*joined.shape[:-2], -1)
