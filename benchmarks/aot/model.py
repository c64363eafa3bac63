"""The whole model, 62 layers of 256 experts, as programs for slices and nodes: weights are shapes on a mesh."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from benchmarks.aot.programs import Program
from benchmarks.aot.targets import Target, on, shape
from minimax_jax.models.cache import Cache
from minimax_jax.models.decode import decode_step, prefill
from minimax_jax.models.minimax import MiniMaxForCausalLM
from minimax_jax.models.sharding import shardings
from minimax_jax.models.weights import abstract_weights
from minimax_jax.synthetic.sizes import REAL


@dataclass(frozen=True, kw_only=True)
class Setting:
    """How the model is served.

    Attributes:
        target: the chips.
        tensor: over how many of them heads and vocabulary are divided; experts are divided over all.
        scaled: F8_E4M3 keeps the weights of the experts and projections in FP8, BF16 does not.
        batch: rows that are decoded together.
        capacity: tokens of a row that the cache has room for.
        prompts: rows of one prefill.
        time: tokens of each of them.
    """

    target: Target
    tensor: int = 8
    scaled: str = "F8_E4M3"
    batch: int = 16
    capacity: int = 4096
    prompts: int = 2
    time: int = 1024


def programs(setting: Setting) -> Iterator[Program]:
    """Prefill and one step of decoding, with a cache whose memory is used again."""
    chips = setting.target.chips
    mesh = setting.target.mesh(expert=chips // setting.tensor, tensor=setting.tensor)
    model = _model(setting, mesh)
    config = model.config
    down = config.hidden_size * config.intermediate_size
    rows, weights = setting.batch, "FP8 kept" if setting.scaled == "F8_E4M3" else "bf16"
    calls = (
        ("prefill", prefill, setting.prompts, (setting.prompts, setting.time)),
        ("decode", decode_step, rows, (rows,)),
    )
    for kind, function, batch, tokens in calls:
        yield Program(
            name=f"{kind} of {' x '.join(map(str, tokens))} tokens, {weights}",
            kind=kind,
            target=setting.target,
            function=function,
            arguments=(model, _ids(mesh, *tokens), _ids(mesh, batch), _cache(setting, mesh, batch)),
            donated=("cache",),
            loops=config.num_hidden_layers,
            matrices=frozenset({2 * down, down}),
            layer_bytes=config.num_local_experts // chips * 2 * down * 2,
        )


def _model(setting: Setting, mesh: Mesh) -> MiniMaxForCausalLM:
    weights = abstract_weights(REAL, scaled=setting.scaled, stacked=True)
    placed = shardings(REAL, mesh, scaled=setting.scaled, stacked=True)
    return MiniMaxForCausalLM(REAL, jax.tree.map(lambda leaf, own: shape(leaf.shape, leaf.dtype, own), weights, placed))


def _ids(mesh: Mesh, *sizes: int) -> jax.ShapeDtypeStruct:
    return shape(sizes, jnp.int32, on(mesh))


def _cache(setting: Setting, mesh: Mesh, batch: int) -> Any:
    """Keys and values, divided by their heads."""
    own = on(mesh, None, None, None, "tensor")
    cache = jax.eval_shape(lambda: Cache.empty(REAL, batch, setting.capacity))
    return jax.tree.map(lambda leaf: shape(leaf.shape, leaf.dtype, own), cache)
