"""Configs, names and small tools of the tests of `from_hf` and `to_hf`."""

import helpers
import jax
import jax.numpy as jnp
import pytest

from minimax_jax.ops.assemble import EXPERTS_AT_ONCE

RAGGED = helpers.config()
SMALL = helpers.config(
    hidden_size=40,
    intermediate_size=24,
    weight_block_size=(16, 8),
    num_hidden_layers=1,
    num_attention_heads=1,
    head_dim=40,
)
CONFIGS = {
    "ragged": RAGGED,
    "one expert": helpers.config(num_local_experts=1, hidden_size=256, intermediate_size=128, num_hidden_layers=1),
    "a batch and a rest": SMALL.replace(num_local_experts=EXPERTS_AT_ONCE + 5),
    "two batches": SMALL.replace(num_local_experts=2 * EXPERTS_AT_ONCE),
}
MLP = "model.layers.0.mlp.experts."
MOE = "model.layers.0.block_sparse_moe."
GATE_UP, DOWN = MLP + "gate_and_up_projs", MLP + "down_projs"
W1, W2, W3 = (MOE + f"experts.1.{name}.weight" for name in ("w1", "w2", "w3"))
Q = "model.layers.0.self_attn.q_proj.weight"
DTYPES = pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])


def on_device(tree):
    return {key: jnp.array(array) for key, array in tree.items()}


def abstract(tree):
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), tree)


def keys_of(error):
    return {problem.key for problem in error.value.problems}
