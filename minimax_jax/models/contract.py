"""How weights meet activations: FP8 stays FP8 until the moment of use, for one layer (or one expert) at a time."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import jax
import jax.numpy as jnp
from jax import lax

from minimax_jax.conversion import Leaf
from minimax_jax.ops.fp8 import FP8
from minimax_jax.ops.rounding import barrier
from minimax_jax.ops.scaled import BlockScaled


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True, eq=False)
class Slice:
    """A slice of stacked FP8 weights that is taken when it is used, so that what lies around it is never copied.

    Attributes:
        whole: weights with leading axes, such as [layer, expert, rows, cols].
        index: which of them, for as many leading axes as are sliced: int32 scalars.
    """

    whole: BlockScaled
    index: tuple[jax.Array, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the slice."""
        return self.whole.shape[len(self.index) :]

    def taken(self) -> BlockScaled:
        """The slice itself."""
        return jax.tree.map(lambda leaf: _at(leaf, *self.index), self.whole) if self.index else self.whole


Weight: TypeAlias = Leaf | Slice
"""What a module may hold for a weight."""


def take(weight: Weight, index: jax.Array) -> Weight:
    """Slice `index` of the leading axis; for FP8 only once it is used."""
    if isinstance(weight, Slice):
        return Slice(whole=weight.whole, index=(*weight.index, index))
    return Slice(whole=weight, index=(index,)) if isinstance(weight, BlockScaled) else _at(jnp.asarray(weight), index)


def contract(operation: Callable[[jax.Array, jax.Array], jax.Array], x: jax.Array, weight: Weight) -> jax.Array:
    """`operation(x, weight)` with the weight brought to the dtype of `x`.

    FP8 weights are dequantised when `x` is known and not before, lest a compiler do it ahead of time for every layer
    or move it out of a decoding loop. For the backward pass the codes are kept and dequantised again.
    """
    if not isinstance(weight, BlockScaled | Slice):
        return operation(x, jnp.asarray(weight).astype(x.dtype))
    part = Slice(whole=weight, index=()) if isinstance(weight, BlockScaled) else weight

    @jax.checkpoint
    def run(x: jax.Array, part: Slice) -> jax.Array:
        x, part = barrier((x, part))
        codes = part.taken()
        scale_inv = lax.platform_dependent(codes.scale_inv, x, cpu=_wait, default=_pass)
        return operation(x, dataclasses.replace(codes, scale_inv=scale_inv).dequantize(x.dtype))

    result: jax.Array = run(x, part)
    return result


def _pass(scale_inv: jax.Array, x: jax.Array) -> jax.Array:
    return scale_inv


def _wait(scale_inv: jax.Array, x: jax.Array) -> jax.Array:
    """`scale_inv`, as a number that depends on `x`: XLA's CPU compiler drops barriers before it orders the program."""
    first = x.reshape(-1)[0]
    never = (first != first) & (first == first)
    return scale_inv + never.astype(jnp.float32)


def _at(leaf: jax.Array, *index: jax.Array) -> jax.Array:
    if leaf.dtype != FP8:
        return _at_any(leaf, *index)
    taken: jax.Array = lax.platform_dependent(leaf, *index, cpu=_at_bytes, default=_at_any)
    return taken


def _at_any(leaf: jax.Array, *index: jax.Array) -> jax.Array:
    rest = leaf.shape[len(index) :]
    start = (*index, *(jnp.zeros_like(index[0]) for _ in rest))
    return lax.dynamic_slice(leaf, start, (*(1 for _ in index), *rest)).reshape(rest)


def _at_bytes(codes: jax.Array, *index: jax.Array) -> jax.Array:
    """XLA's CPU compiler would slice a float16 copy of all codes. Others would copy all codes to see their bytes."""
    codes, index = barrier((codes, index))  # or the bytes are made ahead of a loop, a copy here too
    return lax.bitcast_convert_type(_at_any(lax.bitcast_convert_type(codes, jnp.uint8), *index), FP8)
