"""A first sign of life of a checkpoint: loaded over the devices of this machine, and asked to go on with a prompt."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, Mesh

from minimax_jax.errors import JobError, raise_if
from minimax_jax.jobs.source import open_source
from minimax_jax.models.generate import generate
from minimax_jax.models.load import load_model
from minimax_jax.models.prompts import pad_prompts, prompt_problems, sampling_problems
from minimax_jax.progress import Progress

_DTYPES = {"bf16": jnp.bfloat16, "f32": jnp.float32, "fp8": None}


def smoke_test(
    path: str | Path,
    *,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int = 16,
    temperature: float = 0.0,
    seed: int = 0,
    dtype: str = "fp8",
    ignore: Collection[str] = (),
    leave_out: Collection[str] = (),
    progress: Callable[[Progress], None] | None = None,
) -> list[list[int]]:
    """Load a model with its experts spread over all local devices, and continue prompts.

    Args:
        path: a checkpoint; see `load_model`.
        prompts: token ids of each prompt.
        max_new_tokens: how many tokens to add to each.
        temperature: 0 takes the likeliest token.
        seed: of sampling.
        dtype: of weights on the device: `fp8` keeps what is stored, `bf16` and `f32` dequantise.
        ignore: attributes of config.json to leave unread.
        leave_out: as in `load_model`.
        progress: called as the weights are read.

    Returns:
        The new token ids of each prompt.

    Raises:
        CheckpointError: as `load_model`; JobError for prompts that the model cannot take.
    """
    key = jax.random.key(seed) if temperature else None
    tokens, lengths = pad_prompts(prompts)
    config = open_source(path, ignore=ignore, leave_out=leave_out).config
    problems = [*prompt_problems(tokens, lengths, max_new_tokens, config)]  # before any weight is read
    raise_if([*problems, *sampling_problems(temperature, None, None, key is not None)], JobError)
    mesh = _experts_mesh() if len(jax.local_devices()) > 1 else None
    model = load_model(
        path,
        mesh=mesh,
        dtype=_DTYPES[dtype],
        stacked=True,
        ignore=ignore,
        leave_out=leave_out,
        progress=progress,
    )
    done = generate(model, tokens, lengths, max_new_tokens=max_new_tokens, temperature=temperature, key=key)
    return done.tokens.tolist()


def _experts_mesh() -> Mesh:
    return jax.make_mesh((len(jax.local_devices()),), ("expert",), axis_types=(AxisType.Auto,))
