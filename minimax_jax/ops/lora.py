"""LoRA factors of grouped experts: folded as PEFT folds them, made block-diagonal, multiplied out.

Grouped factors are A `[experts, cols, rank]` and B `[experts, rank, rows]`; they add `scaling * A[e] @ B[e]` to the
grouped weight `[experts, cols, rows]`.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from minimax_jax.ops.assemble import EXPERTS_AT_ONCE, Matrix
from minimax_jax.ops.checks import Array
from minimax_jax.ops.fp8 import requantize
from minimax_jax.ops.rounding import narrow
from minimax_jax.ops.scaled import BlockScaled


@jax.jit
def fold_a(a: Array) -> jax.Array:
    """A `[experts, cols, rank]` to `[experts*rank, cols]`, all of an expert's ranks together."""
    return jnp.swapaxes(a, 1, 2).reshape(-1, a.shape[1])


@partial(jax.jit, static_argnames="experts")
def unfold_a(folded: Array, experts: int) -> jax.Array:
    """The inverse of `fold_a`."""
    return jnp.reshape(folded, (experts, -1, folded.shape[1])).swapaxes(1, 2)


@jax.jit
def fold_b(b: Array) -> jax.Array:
    """B `[experts, rank, rows]` to `[rows, rank*experts]`, one rank of all experts together."""
    return jnp.transpose(b, (2, 1, 0)).reshape(b.shape[2], -1)


@partial(jax.jit, static_argnames="experts")
def unfold_b(folded: Array, experts: int) -> jax.Array:
    """The inverse of `fold_b`."""
    return jnp.reshape(folded, (folded.shape[0], -1, experts)).transpose(2, 1, 0)


@partial(jax.jit, static_argnames=("parts", "blocks"))
def spread_a(a: Array, parts: int, blocks: int) -> jax.Array:
    """A `[experts, cols, parts*rank]`, filled up with zeros to `[experts, cols, blocks*rank]`."""
    return jnp.pad(jnp.asarray(a), ((0, 0), (0, 0), (0, (blocks - parts) * (a.shape[2] // parts))))


@partial(jax.jit, static_argnames=("parts", "blocks"))
def gather_a(a: Array, parts: int, blocks: int) -> tuple[jax.Array, jax.Array]:
    """The inverse of `spread_a`, and bool `[experts]`: where the filling is not 0."""
    used = parts * (a.shape[2] // blocks)
    return jnp.asarray(a)[:, :, :used], (a[:, :, used:] != 0).any((1, 2))


@partial(jax.jit, static_argnames=("parts", "blocks"))
def spread_b(b: Array, parts: int, blocks: int) -> jax.Array:
    """B `[experts, rank, parts*rows]`, made block-diagonal: `[experts, blocks*rank, parts*rows]`.

    Each part has ranks of its own; ranks beyond those of the parts are filled up with zeros.
    """
    _, rank, wide = b.shape
    rows = wide // parts
    pieces = jnp.split(jnp.asarray(b), parts, axis=2)
    placed = [jnp.pad(x, ((0, 0), (0, 0), (p * rows, wide - (p + 1) * rows))) for p, x in enumerate(pieces)]
    return jnp.pad(jnp.concatenate(placed, axis=1), ((0, 0), (0, (blocks - parts) * rank), (0, 0)))


@partial(jax.jit, static_argnames=("parts", "blocks"))
def gather_b(b: Array, parts: int, blocks: int) -> tuple[jax.Array, jax.Array]:
    """The inverse of `spread_b`, and bool `[experts]`: where something off the diagonal is not 0."""
    rank, rows = b.shape[1] // blocks, b.shape[2] // parts
    block = lax.broadcasted_iota(jnp.int32, b.shape, 1) // rank
    part = lax.broadcasted_iota(jnp.int32, b.shape, 2) // rows
    diagonal = [b[:, p * rank : (p + 1) * rank, p * rows : (p + 1) * rows] for p in range(parts)]
    return jnp.concatenate(diagonal, axis=2), ((b != 0) & (block != part)).any((1, 2))


def add_product(weight: Matrix, a: Array, b: Array, scaling: float) -> Matrix:
    """`weight + scaling * a @ b`, in float32, rounded once to the dtype of the weight.

    Concrete arrays go a few experts at a time, so that temporaries do not grow with their number.

    Args:
        weight: `[experts, cols, rows]`. A `BlockScaled` stays one: an expert's matrix that its scales still reproduce
            exactly keeps its codes, any other gets scales by amax.
        a: `[experts, cols, rank]`.
        b: `[experts, rank, rows]`.
        scaling: a number.

    Returns:
        As `weight`, new arrays; NaN in the scales of a `BlockScaled` where the sum is not finite.
    """
    operands = jax.tree.map(jnp.asarray, (weight, a, b))
    experts, factor = weight.shape[0], jnp.float32(scaling)
    traced = any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(operands))
    if traced or experts <= EXPERTS_AT_ONCE:
        whole: Matrix = _add_product(*operands, factor)
        return whole
    out: Matrix = jax.tree.map(jnp.zeros_like, operands[0])
    for start in range(0, experts, EXPERTS_AT_ONCE):
        out = _place_product(out, operands, factor, start, count=min(EXPERTS_AT_ONCE, experts - start))
    return out


@jax.jit
def _add_product(weight: Matrix, a: jax.Array, b: jax.Array, scaling: jax.Array) -> Matrix:
    wide = a.astype(jnp.float32), b.astype(jnp.float32)
    return _add(weight, scaling * jnp.matmul(*wide, precision=lax.Precision.HIGHEST))


@partial(jax.jit, static_argnames="count", donate_argnames="out")
def _place_product(out: Matrix, operands: Any, scaling: jax.Array, start: int, *, count: int) -> Matrix:
    batch = jax.tree.map(lambda leaf: lax.dynamic_slice_in_dim(leaf, start, count), operands)
    placed: Matrix = jax.tree.map(
        lambda whole, piece: lax.dynamic_update_slice_in_dim(whole, piece, start, 0),
        out,
        _add_product(*batch, scaling),
    )
    return placed


def _add(weight: Matrix, product: jax.Array) -> Matrix:
    if not isinstance(weight, BlockScaled):
        return narrow(_sum(jnp.asarray(weight).astype(jnp.float32), product), weight.dtype)
    total = _sum(weight.dequantize(jnp.float32), product)
    values, scale_inv, _ = requantize(total, weight.scale_inv, block=weight.block, parts=weight.parts)
    return BlockScaled(values=values, scale_inv=scale_inv, block=weight.block, parts=weight.parts)


def _sum(weight: jax.Array, product: jax.Array) -> jax.Array:
    return jnp.where(product == 0, weight, weight + product)  # -0 + 0 is 0, and would be a change
