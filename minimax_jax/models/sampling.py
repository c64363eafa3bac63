"""Choosing the next token from logits."""

from __future__ import annotations

from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
from jax import lax


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True, eq=False)
class Sampler:
    """How the next token is chosen; filters apply in the order of transformers: temperature, top-k, top-p.

    Attributes:
        key: random key, or None for the likeliest token.
        temperature: what logits are divided by; positive.
        top_k: sample among the `top_k` likeliest.
        top_p: sample among the likeliest whose probabilities sum up to `top_p`: a token stays while those before it
            sum up to less.
    """

    key: jax.Array | None = None
    temperature: jax.Array | float = 1.0
    top_k: int | None = field(default=None, metadata={"static": True})
    top_p: jax.Array | float | None = None

    def __call__(self, logits: jax.Array, step: jax.Array | int) -> jax.Array:
        """One token for each row of float32 logits [batch, vocab]: int32 [batch]; `step` varies the random key."""
        if self.key is None:
            return jnp.argmax(logits, axis=1).astype(jnp.int32)
        key = jax.random.fold_in(self.key, step)
        logits = logits / self.temperature
        if self.top_k is None and self.top_p is None:
            return jax.random.categorical(key, logits).astype(jnp.int32)
        values, ids = lax.top_k(logits, min(self.top_k or logits.shape[1], logits.shape[1]))
        place = jax.random.categorical(key, values if self.top_p is None else _nucleus(values, self.top_p))
        return jnp.take_along_axis(ids, place[:, None], axis=1)[:, 0]


def _nucleus(values: jax.Array, top_p: jax.Array | float) -> jax.Array:
    """Logits in falling order [batch, vocab], with -inf for those that fall out; the likeliest always stays."""
    shares = jax.nn.softmax(values, axis=1)
    before = jnp.cumsum(shares, axis=1) - shares
    first = jnp.arange(values.shape[1])[None] == 0
    return jnp.where(first | (before < top_p), values, -jnp.inf)
