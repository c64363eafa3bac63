"""One model in every form that can be compared."""

import minimax_jax as mj
from minimax_jax import synthetic

CONFIG = synthetic.config(layers=1, experts=3)


def write_all(root):
    """The same model in FP8, in bf16 and in f32, in both layouts, cut up differently; gives the folder."""
    synthetic.synthesize(root / "hf", CONFIG, shard_bytes=60_000)
    mj.convert(root / "hf", root / "one-file", to="hf-fp8")
    mj.convert(root / "hf", root / "fp8", dtype="fp8", shard_bytes=80_000)
    mj.convert(root / "hf", root / "bf16")
    mj.convert(root / "hf", root / "f32", dtype="f32")
    mj.convert(root / "hf", root / "hf-bf16", to="hf")
    return root
