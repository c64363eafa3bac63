"""Orbax checkpoints for tests, and what should be in them."""

import folders
import jax
from helpers import differences
from jax.sharding import AxisType

import minimax_jax as mj
from minimax_jax import synthetic
from minimax_jax.dtypes import DTYPES
from minimax_jax.jobs.orbax import write
from minimax_jax.jobs.source import open_source
from minimax_jax.ops.scaled import BlockScaled

SUFFIX = "_scale_inv"
GATE_UP = "model.layers.0.mlp.experts.gate_and_up_projs"
BIAS = "model.layers.0.mlp.gate.e_score_correction_bias"


def synthesize(folder):
    """An FP8 checkpoint in several files; among its tensors, one that is all zeros."""
    synthetic.synthesize(folder, synthetic.config(layers=1, experts=8), shard_bytes=300_000)
    folders.edit(folder, "model.layers.0.block_sparse_moe.e_score_correction_bias", lambda tensor: tensor * 0)
    return folder


def write_all(source, folder):
    """The source in Orbax, by dtype of its block-scaled weights."""
    for dtype in ("BF16", "F32", "F8_E4M3"):
        write(open_source(source), folder / dtype, dtype=dtype)
    return folder


def stored(tree):
    """A tree with each `BlockScaled` taken apart."""
    parts = {}
    for key, leaf in tree.items():
        parts |= {key: leaf.values, key + SUFFIX: leaf.scale_inv} if isinstance(leaf, BlockScaled) else {key: leaf}
    return parts


def expected(source, dtype):
    keep = dtype == "F8_E4M3"
    return mj.from_hf(
        folders.arrays(source), mj.MiniMaxConfig.from_pretrained(source), dtype=None if keep else DTYPES[dtype]
    )


def assert_same(got, want):
    assert {key: type(leaf) is BlockScaled for key, leaf in got.items()} == {
        key: type(leaf) is BlockScaled for key, leaf in want.items()
    }
    assert differences(stored(got), stored(want)) == []
    for key, leaf in want.items():
        if isinstance(leaf, BlockScaled):
            assert (got[key].block, got[key].parts) == (leaf.block, leaf.parts)


def mesh(*sizes):
    return jax.make_mesh(sizes, ("expert", "fsdp"), axis_types=(AxisType.Auto,) * 2)
