"""The two programs of generation: prefill of the prompts, and one step of decoding."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from minimax_jax.models.cache import Cache
from minimax_jax.models.minimax import MiniMaxForCausalLM


def prefill(model: MiniMaxForCausalLM, tokens: jax.Array, lengths: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
    """Run the model over prompts, from the beginning.

    Args:
        model: the model.
        tokens: ids, int32 [batch, time], padded on the right.
        lengths: tokens of each prompt, int32 [batch].
        cache: a cache of at least `time` slots; what it holds is overwritten.

    Returns:
        Logits behind each prompt's last token, float32 [batch, vocab], and the cache with the prompts in it.
    """
    return _extend(model, tokens, None, cache, lengths - 1)


def decode_step(
    model: MiniMaxForCausalLM, tokens: jax.Array, start: jax.Array, cache: Cache
) -> tuple[jax.Array, Cache]:
    """Run the model over one more token of each row.

    Args:
        model: the model.
        tokens: ids, int32 [batch].
        start: their positions, that is how many tokens of each row the cache holds already: int32 [batch].
        cache: those tokens.

    Returns:
        Logits behind them, float32 [batch, vocab], and the cache with them in it.
    """
    return _extend(model, tokens[:, None], start, cache, jnp.zeros_like(start))


def _extend(
    model: MiniMaxForCausalLM, tokens: jax.Array, start: jax.Array | None, cache: Cache, last: jax.Array
) -> tuple[jax.Array, Cache]:
    """Logits at place `last` [batch] of each row alone: those of a whole prompt would be many GB."""
    hidden, filled, _ = model.model(tokens, start, cache)
    assert filled is not None
    return model.logits(jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0]), filled
