"""The smallest modules of the model.

Every module is built from its part of a native tree, nested by the dots of the names: arrays, `BlockScaled`, or
`jax.ShapeDtypeStruct` for a model that is only a shape. So names and shapes come from the layout table, and the
attributes of a module are the steps of the native names.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from minimax_jax.conversion import Leaf
from minimax_jax.models.contract import contract
from minimax_jax.ops.scaled import BlockScaled

Leaves: TypeAlias = Mapping[str, Any]
"""One module's part of a nested native tree."""


class Fixed(nnx.Variable[Any]):
    """A tensor of the checkpoint that no optimiser may touch: FP8 weights, and the router's choice-only bias."""


def trained(leaf: Leaf) -> nnx.Variable[Any]:
    """The variable for a weight: `nnx.Param`, or `Fixed` where the weight stays FP8 and so cannot be trained."""
    return Fixed(leaf) if isinstance(leaf, BlockScaled) else nnx.Param(leaf)


class Linear(nnx.Module):
    """`x weight^T`, without a bias; weight [out, in]."""

    def __init__(self, leaves: Leaves):
        self.weight = trained(leaves["weight"])

    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., in] to [..., out], in the dtype of `x`."""
        return contract(lambda x, w: jnp.einsum("...i,oi->...o", x, w), x, self.weight.get_value())


class Embedding(nnx.Module):
    """One row for each token id, and the output head; weight [vocab, hidden]."""

    def __init__(self, leaves: Leaves):
        self.weight = trained(leaves["weight"])

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Ids [batch, time] to rows [batch, time, hidden]; an id beyond the vocabulary becomes NaN."""
        # Of one id alone XLA makes a slice, for which a table that is divided over devices would go to all of them.
        ids = tokens if tokens.size > 1 else jnp.repeat(tokens, 2, axis=1)
        return jnp.take(self.weight.get_value(), ids, axis=0, mode="fill")[:, : tokens.shape[1]]

    def logits(self, x: jax.Array) -> jax.Array:
        """[..., hidden] to float32 [..., vocab]."""
        weight = self.weight.get_value().astype(x.dtype)
        return jnp.einsum("...h,vh->...v", x, weight, preferred_element_type=jnp.float32)


class RMSNorm(nnx.Module):
    """Root-mean-square norm in float32; weight [features]."""

    def __init__(self, leaves: Leaves, eps: float):
        self.weight = trained(leaves["weight"])
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        """[batch, time, features], same dtype: `weight * cast(x * rsqrt(mean(x^2) + eps))`."""
        wide = x.astype(jnp.float32)
        wide *= lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + self.eps)
        weight = self.weight.get_value().astype(x.dtype)
        scaled: jax.Array = weight[None, None] * wide.astype(x.dtype)
        return scaled
