"""The key-value cache of decoding."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from minimax_jax.layout.config import MiniMaxConfig


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True, eq=False)
class Cache:
    """Keys and values of the tokens so far; slot `p` of a row holds its token at position `p`.

    A query at position `p` sees the slots up to `p`. What padding has written further on is never seen: the row's
    own tokens overwrite it before any query reaches it.

    Attributes:
        keys: [layers, batch, capacity, kv_heads, head_dim], normalised and rotated.
        values: of the same shape.
    """

    keys: jax.Array
    values: jax.Array

    @classmethod
    def empty(cls, config: MiniMaxConfig, batch: int, capacity: int, dtype: DTypeLike = jnp.bfloat16) -> Cache:
        """A cache of zeros for `batch` rows of at most `capacity` tokens."""
        shape = (config.num_hidden_layers, batch, capacity, config.num_key_value_heads, config.head_dim)
        return cls(keys=jnp.zeros(shape, dtype), values=jnp.zeros(shape, dtype))

    def write(
        self, layer: int | jax.Array, keys: jax.Array, values: jax.Array, start: jax.Array | None = None
    ) -> Cache:
        """A cache with the keys and values of one layer put in; the buffers are reused under `jit`.

        Args:
            layer: index of the layer.
            keys: [batch, time, kv_heads, head_dim].
            values: of the same shape.
            start: [batch], the slot of each row's first token; None is slot 0 for all. What falls beyond the
                capacity is dropped.
        """
        return Cache(
            keys=_put(self.keys, layer, keys, start),
            values=_put(self.values, layer, values, start),
        )

    def read(self, layer: int | jax.Array, dtype: DTypeLike) -> tuple[jax.Array, jax.Array]:
        """Keys and values of one layer, each [batch, capacity, kv_heads, head_dim]."""
        return self.keys[layer].astype(dtype), self.values[layer].astype(dtype)


def _put(whole: jax.Array, layer: int | jax.Array, new: jax.Array, start: jax.Array | None) -> jax.Array:
    new = new.astype(whole.dtype)
    if start is None:
        return lax.dynamic_update_slice(whole, new[None], (layer, 0, 0, 0, 0))
    batch, time = new.shape[:2]
    slots = start[:, None] + jnp.arange(time)[None]
    return whole.at[layer, jnp.arange(batch)[:, None], slots].set(new, mode="drop")
