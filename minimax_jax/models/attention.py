"""Grouped-query attention with a norm over the flat heads and rotary positions on the first dims of each head."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from minimax_jax.layout.config import MiniMaxConfig
from minimax_jax.models.cache import Cache
from minimax_jax.models.parts import Leaves, Linear, RMSNorm


class Place(NamedTuple):
    """Where the tokens of one call stand; the same for every layer.

    Attributes:
        cos: from `rotary_angles`.
        sin: from `rotary_angles`.
        start: how many tokens of each row come before them, int32 [batch]; None: none do.
    """

    cos: jax.Array
    sin: jax.Array
    start: jax.Array | None


class Attention(nnx.Module):
    """Self-attention of one layer."""

    def __init__(self, leaves: Leaves, config: MiniMaxConfig):
        self.q_proj = Linear(leaves["q_proj"])
        self.k_proj = Linear(leaves["k_proj"])
        self.v_proj = Linear(leaves["v_proj"])
        self.o_proj = Linear(leaves["o_proj"])
        self.q_norm = RMSNorm(leaves["q_norm"], config.rms_norm_eps)
        self.k_norm = RMSNorm(leaves["k_norm"], config.rms_norm_eps)
        self.head_dim = config.head_dim

    def __call__(
        self, x: jax.Array, place: Place, cache: Cache | None, layer: int | jax.Array
    ) -> tuple[jax.Array, Cache | None]:
        """Attend over the tokens of `x`, and over what the cache holds before them.

        Args:
            x: [batch, time, hidden].
            place: where the tokens of `x` stand.
            cache: where the tokens before them are, and where they go; None: they are not kept.
            layer: index of the layer in the cache.

        Returns:
            [batch, time, hidden], and the cache with the new tokens in it.
        """
        q = rotate(self._heads(self.q_norm(self.q_proj(x))), place.cos, place.sin)
        k = rotate(self._heads(self.k_norm(self.k_proj(x))), place.cos, place.sin)
        v = self._heads(self.v_proj(x))
        if cache is not None:
            cache = cache.write(layer, k, v, place.start)
            if place.start is not None:
                k, v = cache.read(layer, x.dtype)
        attended = attend(q, k, v, place.start)
        return self.o_proj(attended.reshape(*x.shape[:2], -1)), cache

    def _heads(self, flat: jax.Array) -> jax.Array:
        return flat.reshape(*flat.shape[:2], -1, self.head_dim)


def attend(q: jax.Array, k: jax.Array, v: jax.Array, start: jax.Array | None = None) -> jax.Array:
    """Causal attention, softmax in float32; query head `h` reads KV head `h // (heads / kv_heads)`.

    Args:
        q: [batch, time, heads, head_dim].
        k: [batch, slots, kv_heads, head_dim]; slot `s` is position `s`.
        v: of the same shape.
        start: [batch], position of each row's first query; None is 0.

    Returns:
        [batch, time, heads, head_dim], in the dtype of `q`.
    """
    batch, time, heads, dim = q.shape
    q = q.reshape(batch, time, k.shape[2], -1, dim)
    scores = jnp.einsum("btkgd,bskd->bkgts", q, k, preferred_element_type=jnp.float32) * dim**-0.5
    seen = jnp.arange(k.shape[1])[None, None] <= positions(time, start)[:, :, None]
    scores = jnp.where(seen[:, None, None], scores, np.finfo(np.float32).min)
    shares = jax.nn.softmax(scores, axis=-1).astype(q.dtype)
    return jnp.einsum("bkgts,bskd->btkgd", shares, v).reshape(batch, time, heads, dim)


def positions(time: int, start: jax.Array | None = None) -> jax.Array:
    """Positions of `time` tokens from `start` [batch] on: int32 [batch, time], or [1, time] where `start` is None."""
    steps = jnp.arange(time, dtype=jnp.int32)[None]
    return steps if start is None else start[:, None] + steps


def rotary_angles(positions: jax.Array, config: MiniMaxConfig) -> tuple[jax.Array, jax.Array]:
    """Cosine and sine of `position * theta^(-2i/rotary_dim)`, each float32 [batch, time, 1, rotary_dim/2].

    Args:
        positions: int32 [batch, time].
        config: the checkpoint's config.
    """
    speeds = config.rope_theta ** -(np.arange(0, config.rotary_dim, 2) / config.rotary_dim)
    turns = positions[:, :, None, None].astype(jnp.float32) * speeds.astype(np.float32)[None, None, None]
    return jnp.cos(turns), jnp.sin(turns)


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotary positions in the NeoX style: dim `i` turns with dim `i + rotary_dim/2`; the dims behind pass through.

    Args:
        x: [batch, time, heads, head_dim].
        cos: float32 [batch or 1, time, 1, rotary_dim/2].
        sin: of the same shape.

    Returns:
        As `x`; the turn itself is in float32.
    """
    half = cos.shape[-1]
    first, second, rest = jnp.split(x, (half, 2 * half), axis=-1)
    first, second = first.astype(jnp.float32), second.astype(jnp.float32)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return jnp.concatenate([turned.astype(x.dtype), rest], axis=-1)
