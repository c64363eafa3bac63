"""Checkpoints with certificates of theirs."""

import minimax_jax as mj
from minimax_jax import synthetic

CONFIG = synthetic.config(layers=2, experts=3)
EMBED = "model.embed_tokens.weight"
Q_PROJ = "model.layers.1.self_attn.q_proj.weight"


def make(root):
    """A checkpoint in three forms, and the certificates of two of them."""
    synthetic.synthesize(root / "hf", CONFIG, shard_bytes=300_000)
    mj.convert(root / "hf", root / "fp8", dtype="fp8")
    mj.convert(root / "hf", root / "bf16")
    for name in ("hf", "bf16"):
        mj.verify(root / name, output=root / f"{name}.json")
    return root


def mismatches(seen):
    return {(each.name, each.what) for each in seen.held.mismatches}
