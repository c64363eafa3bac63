"""Checkpoints to convert."""

import minimax_jax as mj
from minimax_jax import synthetic
from minimax_jax.layout.specs import specs

TINY = synthetic.TINY
RAGGED = synthetic.config(
    layers=2,
    experts=3,
    hidden_size=200,
    intermediate_size=136,
    vocab_size=70,
    num_attention_heads=2,
    num_key_value_heads=2,
    head_dim=100,
    rotary_dim=50,
)
"""Two blocks along each axis, the second of them ragged. Its four projections have one shape: less to compile."""

SCALED = {"fp8": "F8_E4M3", "bf16": "BF16", "f32": "F32"}


def hf_tree(config, dtype):
    return {key: synthetic.values(key, config, scaled=SCALED[dtype]) for key in hf_names(config, dtype)}


def hf_names(config, dtype):
    return [spec.key for spec in specs(config).hf(SCALED[dtype])]


def make(root):
    """An FP8 checkpoint in many files, scales apart from their weights; and the native form that one worker made."""
    synthetic.synthesize(root / "hf", RAGGED, shard_bytes=50_000)
    mj.convert(root / "hf", root / "native", shard_bytes=100_000, workers=1)
    return root
