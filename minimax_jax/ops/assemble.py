"""Many expert matrices to one grouped tensor and back, with the FP8 codec on the way; jitted, in batches of experts.

Under a trace the whole tensor is one expression, so that the compiler sees all of it. On concrete arrays a batch of
experts at a time goes through one compiled program into one output: the temporaries and the compile time do not grow
with the number of experts.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike

from minimax_jax.ops import host_matrices as host
from minimax_jax.ops.checks import Array
from minimax_jax.ops.experts import group, stack, ungroup
from minimax_jax.ops.fp8 import FP8, quantize, requantize
from minimax_jax.ops.grouped import quantize_grouped
from minimax_jax.ops.rounding import bits_of, narrow
from minimax_jax.ops.scaled import BlockScaled, dequantize_grouped, group_scaled, ungroup_scaled

Matrix: TypeAlias = Array | BlockScaled
Experts: TypeAlias = Sequence[Sequence[Matrix]]
"""`experts[e][part]`: matrices `[rows, cols]`, the same parts for every expert."""

EXPERTS_AT_ONCE = 16


def assemble(experts: Experts, dtype: DTypeLike | None) -> Matrix:
    """Group per-expert matrices: `experts[e][part] [rows, cols]` to `[experts, cols, parts*rows]`.

    Args:
        experts: arrays, or `BlockScaled` for FP8 weights.
        dtype: dtype of the result; None keeps what is there, FP8 as a `BlockScaled` with its scales grouped alike.

    Returns:
        A new array (or `BlockScaled` of new arrays).
    """
    dtype = None if dtype is None else np.dtype(dtype)
    if _traced(experts):
        return _assemble(experts, dtype)
    if (done := host.assemble(experts, dtype)) is not None:
        return done
    if len(experts) <= EXPERTS_AT_ONCE:
        whole: Matrix = _assemble_jit(experts, dtype)
        return whole
    batches = [(start, experts[start : start + EXPERTS_AT_ONCE]) for start in range(0, len(experts), EXPERTS_AT_ONCE)]
    like = jax.eval_shape(_assemble_jit, batches[0][1], dtype)
    out: Matrix = jax.tree.map(lambda leaf: jnp.zeros((len(experts), *leaf.shape[1:]), leaf.dtype), like)
    for start, batch in batches:
        out = _place(out, batch, start, dtype)
    return out


def split(
    grouped: Matrix,
    parts: int,
    dtype: DTypeLike | None = None,
    *,
    block: tuple[int, int],
    source: Array | None = None,
) -> list[tuple[Matrix, ...]]:
    """The inverse of `assemble`: `[experts, cols, parts*rows]` to `experts[e][part] [rows, cols]`, encoded on the way.

    Args:
        grouped: the grouped tensor.
        parts: how many matrices one expert is made of.
        dtype: what the matrices become; see `encode`.
        block: rows and columns of one FP8 block of a part.
        source: grouped source scales `[experts, grid_cols, parts*grid_rows]`; see `encode`.

    Returns:
        New arrays, or `BlockScaled`s of new arrays.
    """
    dtype = None if dtype is None else np.dtype(dtype)
    if _traced((grouped, source)):
        return _take_apart(_encode_parts(grouped, source, parts=parts, dtype=dtype, block=block))
    if (done := host.split(grouped, parts, dtype, block=block, source=source)) is not None:
        return done
    out: list[tuple[Matrix, ...]] = []
    for start in range(0, grouped.shape[0], EXPERTS_AT_ONCE):
        batch = _batch((grouped, source), start)
        out += _take_apart_jit(_encode_parts_jit(*batch, parts=parts, dtype=dtype, block=block))
    return out


def encode(
    matrix: Matrix,
    dtype: DTypeLike | None,
    *,
    block: tuple[int, int],
    parts: int = 1,
    source: Array | None = None,
) -> Matrix:
    """Bring weights `[..., rows, cols]` to `dtype`.

    Args:
        matrix: an array, or a `BlockScaled` for FP8 weights.
        dtype: float8_e4m3fn for a `BlockScaled`, a float dtype for an array, None for what is there.
        block: rows and columns of one FP8 block, in the orientation of `matrix`.
        parts: how many matrices stand side by side; see `quantize`.
        source: scales `[..., grid_rows, grid_cols]`. A matrix that they reproduce exactly keeps them; any other gets
            scales by amax.

    Returns:
        A new array or `BlockScaled`; `matrix` itself where it has that dtype already. Nothing is raised for weights
        that hold NaN or infinity: where quantised, their scales are NaN.
    """
    if dtype is None or matrix.dtype == np.dtype(dtype):
        return matrix
    dtype = np.dtype(dtype)
    if not _traced((matrix, source)):
        done = host.encode(matrix, dtype, block=block, parts=parts, source=source)
        if done is not None:
            return done
    encoded: Matrix = _encode(matrix, source, dtype=dtype, block=block, parts=parts)
    return encoded


def _assemble(experts: Experts, dtype: np.dtype[Any] | None) -> Matrix:
    parts = jax.tree.map(lambda *leaves: stack(leaves), *(tuple(expert) for expert in experts))
    if not isinstance(parts[0], BlockScaled):
        return group(parts if dtype is None else [_cast(part, dtype) for part in parts])
    return group_scaled(parts) if dtype is None else dequantize_grouped(parts, dtype)


_assemble_jit = jax.jit(_assemble, static_argnames="dtype")


@functools.partial(jax.jit, static_argnames="dtype", donate_argnames="out")
def _place(out: Matrix, experts: Experts, start: int, dtype: np.dtype[Any] | None) -> Matrix:
    placed: Matrix = jax.tree.map(
        lambda whole, piece: lax.dynamic_update_slice_in_dim(whole, piece, start, 0), out, _assemble(experts, dtype)
    )
    return placed


@functools.partial(jax.jit, static_argnames=("dtype", "block", "parts"))
def _encode(
    matrix: Matrix, source: Array | None, *, dtype: np.dtype[Any], block: tuple[int, int], parts: int
) -> Matrix:
    if isinstance(matrix, BlockScaled):
        return matrix.dequantize(dtype)
    if dtype != FP8:
        return _cast(matrix, dtype)
    if source is None:
        values, scale_inv = quantize(matrix, block=block, parts=parts)
    else:
        values, scale_inv, _ = requantize(matrix, source, block=block, parts=parts)
    return BlockScaled(values=values, scale_inv=scale_inv, block=block, parts=parts)


def _encode_parts(
    grouped: Matrix, source: Array | None, *, parts: int, dtype: np.dtype[Any] | None, block: tuple[int, int]
) -> tuple[Matrix, ...]:
    """The parts `[experts, rows, cols]` of a grouped tensor, encoded."""
    if dtype == FP8 and source is None and not isinstance(grouped, BlockScaled):
        return quantize_grouped(grouped, parts, block=block)
    pieces: tuple[Matrix, ...] = (
        ungroup_scaled(grouped) if isinstance(grouped, BlockScaled) else ungroup(grouped, parts)
    )
    sources: tuple[Array | None, ...] = (None,) * parts if source is None else ungroup(source, parts)
    return tuple(
        encode(piece, dtype, block=block, source=scales) for piece, scales in zip(pieces, sources, strict=True)
    )


_encode_parts_jit = jax.jit(_encode_parts, static_argnames=("parts", "dtype", "block"))


def _take_apart(parts: Sequence[Matrix]) -> list[tuple[Matrix, ...]]:
    return [_expert(tuple(parts), expert) for expert in range(parts[0].shape[0])]


# Apart from the encoding, which XLA on CPU would fuse into the matrices of every expert and compile once for each.
_take_apart_jit = jax.jit(_take_apart)


def _expert(parts: tuple[Matrix, ...], expert: int) -> tuple[Matrix, ...]:
    """The matrices `[rows, cols]` of one expert.

    By their bits: where experts are spread over devices XLA takes one by adding zeros of the other devices, and
    -0 + 0 is 0.
    """
    matrices: tuple[Matrix, ...] = jax.tree.map(
        lambda leaf: lax.bitcast_convert_type(bits_of(leaf)[expert], leaf.dtype), parts
    )
    return matrices


def _batch(tree: Any, start: int) -> Any:
    """The experts of one batch. Of a numpy array that is a view, so that no more than a batch goes to the device."""

    def part(leaf: Array) -> Array:
        if isinstance(leaf, np.ndarray):
            return leaf[start : start + EXPERTS_AT_ONCE]
        batch: jax.Array = _slice(leaf, start, count=min(EXPERTS_AT_ONCE, leaf.shape[0] - start))
        return batch

    return jax.tree.map(part, tree)


@functools.partial(jax.jit, static_argnames="count")
def _slice(array: jax.Array, start: int, *, count: int) -> jax.Array:
    return lax.dynamic_slice_in_dim(array, start, count)


def _cast(x: Array, dtype: np.dtype[Any]) -> jax.Array:
    return jnp.asarray(x) if x.dtype == dtype else narrow(jnp.asarray(x).astype(jnp.float32), dtype)


def _traced(tree: Any) -> bool:
    return any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(tree))
