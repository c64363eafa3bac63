"""Trees of tensors as a header tells them, and the problems that a check finds in them."""

import random
from dataclasses import dataclass
from pathlib import Path

import pytest

import minimax_jax as mj
from minimax_jax.layout.check import survey
from minimax_jax.layout.specs import specs

CONFIG = mj.MiniMaxConfig(
    hidden_size=40,
    intermediate_size=24,
    num_hidden_layers=5,
    num_local_experts=6,
    num_experts_per_tok=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=6,
    rotary_dim=4,
    vocab_size=50,
    weight_block_size=(16, 16),
)

LAYER = "model.layers.3."
Q = LAYER + "self_attn.q_proj.weight"
MOE = LAYER + "block_sparse_moe."
W1, W2, W3 = (f"{MOE}experts.4.{part}.weight" for part in ("w1", "w2", "w3"))
GATE_AND_UP = LAYER + "mlp.experts.gate_and_up_projs"
SCALE = "_scale_inv"


@dataclass(frozen=True)
class Tensor:
    dtype: str
    shape: tuple[int, ...]
    file: Path | None = Path("shard.safetensors")


def tree(tensors):
    """In an order that is not the table's: a check may not depend on it."""
    stored = [(spec.key, Tensor(spec.dtype, spec.shape)) for spec in tensors]
    random.Random(0).shuffle(stored)
    return dict(stored)


def hf(scaled="F8_E4M3", config=CONFIG, prefix="model."):
    return tree(specs(config, prefix).hf(scaled))


def native(scaled="BF16", config=CONFIG, prefix="model."):
    return tree(specs(config, prefix).native(scaled))


def without(tensors, *parts):
    return {key: tensor for key, tensor in tensors.items() if not any(part in key for part in parts)}


def problems_of(tensors, config=CONFIG, **options):
    with pytest.raises(mj.LayoutError) as caught:
        survey(tensors, config, **options)
    return caught.value.problems


def told(problem):
    return problem.what, problem.file, problem.key, problem.expected, problem.got


def fault(what, key, expected, got, *, file="shard.safetensors"):
    return what, file, key, expected, got


LOST_Q = fault("missing tensor", Q, "1 for model.layers.{layer}.self_attn.q_proj.weight", "0", file=None)
