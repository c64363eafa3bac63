"""Text generation: prefill and decoding steps, joined by a loop inside one compiled program."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike

from minimax_jax.errors import JobError, raise_if
from minimax_jax.models.cache import Cache
from minimax_jax.models.decode import decode_step, prefill
from minimax_jax.models.minimax import MiniMaxForCausalLM
from minimax_jax.models.prompts import prompt_problems, sampling_problems
from minimax_jax.models.sampling import Sampler


class Generated(NamedTuple):
    """What was generated.

    Attributes:
        tokens: ids behind the prompts, int32 [batch, max_new_tokens]; padding behind a stop token.
        lengths: how many of them count, a stop token included: int32 [batch].
    """

    tokens: jax.Array
    lengths: jax.Array


def generate(
    model: MiniMaxForCausalLM,
    tokens: ArrayLike,
    lengths: ArrayLike | None = None,
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    key: jax.Array | None = None,
    stop: Sequence[int] = (),
    pad: int = 0,
) -> Generated:
    """Continue a batch of prompts.

    Compiled once for each shape of `tokens`, `max_new_tokens`, `top_k` and kind of sampling.

    Args:
        model: the model.
        tokens: prompts, integers [batch, time], padded on the right with any ids; values that the host can read.
            `pad_prompts` makes them.
        lengths: tokens of each prompt, [batch]; None: all of them count.
        max_new_tokens: how many to generate at most.
        temperature: 0 takes the likeliest token; above that, tokens are sampled.
        top_k: as in `Sampler`.
        top_p: as in `Sampler`.
        key: random key; needed for sampling.
        stop: ids that end a row; the loop ends when every row has ended.
        pad: the id that fills a row behind its end.

    Raises:
        JobError: arguments that are out of range or do not fit each other; all of them.
    """
    prompts = np.asarray(tokens)
    counts = np.full(prompts.shape[:1], prompts.shape[-1]) if lengths is None else np.asarray(lengths)
    problems = [*prompt_problems(prompts, counts, max_new_tokens, model.config)]
    raise_if([*problems, *sampling_problems(temperature, top_k, top_p, key is not None)], JobError)
    sampler = Sampler()
    if temperature:
        nucleus = None if top_p is None else jnp.float32(top_p)
        sampler = Sampler(key=key, temperature=jnp.float32(temperature), top_k=top_k, top_p=nucleus)
    ids = (prompts, counts, np.asarray(stop), np.asarray(pad))
    result: Generated = _generate(model, *(x.astype(np.int32) for x in ids), sampler, max_new_tokens=max_new_tokens)
    return result


class _State(NamedTuple):
    """Where the loop stands: `step` tokens were chosen for rows that have not ended; the last is not in the cache."""

    step: jax.Array
    tokens: jax.Array
    lengths: jax.Array
    ended: jax.Array
    cache: Cache


@functools.partial(jax.jit, static_argnames="max_new_tokens")
def _generate(
    model: MiniMaxForCausalLM,
    prompts: jax.Array,
    lengths: jax.Array,
    stop: jax.Array,
    pad: jax.Array,
    sampler: Sampler,
    *,
    max_new_tokens: int,
) -> Generated:
    def choose(state: _State, logits: jax.Array, cache: Cache) -> _State:
        token = jnp.where(state.ended, pad, sampler(logits, state.step))
        return _State(
            step=state.step + 1,
            tokens=state.tokens.at[:, state.step].set(token),
            lengths=state.lengths + (~state.ended).astype(jnp.int32),
            ended=state.ended | (token[:, None] == stop[None]).any(axis=1),
            cache=cache,
        )

    def advance(state: _State) -> _State:
        last = state.step - 1
        return choose(state, *decode_step(model, state.tokens[:, last], lengths + last, state.cache))

    batch, time = prompts.shape
    cache = Cache.empty(model.config, batch, time + max_new_tokens - 1, model.model.dtype)
    nothing = _State(
        step=jnp.int32(0),
        tokens=jnp.full((batch, max_new_tokens), pad),
        lengths=jnp.zeros(batch, jnp.int32),
        ended=jnp.zeros(batch, bool),
        cache=cache,
    )
    first = choose(nothing, *prefill(model, prompts, lengths, cache))
    final = lax.while_loop(lambda state: (state.step < max_new_tokens) & ~state.ended.all(), advance, first)
    return Generated(final.tokens, final.lengths)
