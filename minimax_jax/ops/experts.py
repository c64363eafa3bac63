"""How expert matrices are grouped: side by side, and transposed. The one shape rule, for codes, scales and weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from minimax_jax.errors import LayoutError, Problem, raise_if
from minimax_jax.ops.checks import Array


def group(parts: Sequence[Array]) -> jax.Array:
    """Grouped tensor of the matrices of all experts.

    Gate and up, each [experts, inter, hidden], become [experts, hidden, 2*inter]; down alone, [experts, hidden,
    inter], becomes [experts, inter, hidden]. Joined first and transposed once, which is what compilers fuse best.

    Args:
        parts: each [experts, rows of its own, cols], all of one dtype.

    Returns:
        [experts, cols, all rows], of the same dtype; a copy.

    Raises:
        LayoutError: no parts, or parts that differ in experts, columns or dtype.
    """
    raise_if(_group_problems(parts), LayoutError)
    arrays = tuple(jnp.asarray(part) for part in parts)
    return _join_bfloat16(arrays) if arrays[0].dtype == jnp.bfloat16 else _join(arrays)


def ungroup(grouped: Array, parts: int) -> tuple[jax.Array, ...]:
    """The inverse of `group` for parts of equal rows.

    Args:
        grouped: [experts, cols, parts * rows].
        parts: how many matrices of an expert stand side by side.

    Returns:
        One array [experts, rows, cols] for each part, of the same dtype; copies.

    Raises:
        LayoutError: `grouped` does not have three axes, or its last axis does not divide into `parts`.
    """
    if grouped.ndim != 3 or parts < 1 or grouped.shape[2] % parts:
        expected = f"shape [experts, cols, {parts} * rows]"
        raise LayoutError(Problem(what="not a grouped tensor", expected=expected, got=f"shape {grouped.shape}"))
    return tuple(part.swapaxes(1, 2) for part in jnp.split(jnp.asarray(grouped), parts, axis=2))


def stack(arrays: Sequence[Array]) -> jax.Array:
    """Arrays of one shape and dtype along a new leading axis, every bit as it was: a copy."""
    held = tuple(jnp.asarray(array) for array in arrays)
    return _stack_bfloat16(held) if held[0].dtype == jnp.bfloat16 else jnp.stack(held)


def _join(parts: tuple[jax.Array, ...]) -> jax.Array:
    return jnp.concatenate(parts, axis=1).swapaxes(1, 2)


@jax.custom_jvp
def _join_bfloat16(parts: tuple[jax.Array, ...]) -> jax.Array:
    """Join as bits: on CPU, XLA joins bfloat16 by way of float32, which changes the payloads of NaNs.

    Not for codes as well: between them and their scales, the change of type costs a GPU or TPU a copy.
    """
    bits = tuple(lax.bitcast_convert_type(part, jnp.uint16) for part in parts)
    return lax.bitcast_convert_type(_join(bits), jnp.bfloat16)


@jax.custom_jvp
def _stack_bfloat16(arrays: tuple[jax.Array, ...]) -> jax.Array:
    """Stack as bits, for the same reason."""
    bits = [lax.bitcast_convert_type(array, jnp.uint16) for array in arrays]
    return lax.bitcast_convert_type(jnp.stack(bits), jnp.bfloat16)


@_stack_bfloat16.defjvp
def _stack_bfloat16_jvp(primals: tuple[Any], tangents: tuple[Any]) -> tuple[jax.Array, jax.Array]:
    return _stack_bfloat16(*primals), jnp.stack(*tangents)


@_join_bfloat16.defjvp
def _join_bfloat16_jvp(primals: tuple[Any], tangents: tuple[Any]) -> tuple[jax.Array, jax.Array]:
    return _join_bfloat16(*primals), _join(*tangents)  # bits alone would have no derivative


def _group_problems(parts: Sequence[Array]) -> list[Problem]:
    if not parts:
        return [Problem(what="nothing to group")]
    got = ", ".join(f"{part.dtype}{list(part.shape)}" for part in parts)
    if any(part.ndim != 3 for part in parts):
        return [Problem(what="not the matrices of experts", expected="shape [experts, rows, cols]", got=got)]
    kinds = {(part.shape[0], part.shape[2], part.dtype) for part in parts}
    if len(kinds) > 1:
        return [Problem(what="parts that do not go side by side", expected="equal experts, cols and dtype", got=got)]
    return []
