"""Checkpoints to report on, and their figures by numpy in float64."""

import itertools

import folders
import numpy as np
from folders import SUFFIX
from helpers import F32, FP8, config, quantize, random_hf

import minimax_jax as mj
from minimax_jax.jobs.findings import findings
from minimax_jax.jobs.measure import gather
from minimax_jax.jobs.source import open_source

CONFIG = config(num_local_experts=9)
BLOCK = CONFIG.block
MOE = "model.layers.1.block_sparse_moe."
W1, W2 = MOE + "experts.4.w1.weight", MOE + "experts.7.w2.weight"
BIAS = MOE + "e_score_correction_bias"
EMBED, NORM = "model.embed_tokens.weight", "model.norm.weight"


def make(root):
    """A random checkpoint in FP8 and in bf16, in both layouts."""
    folders.write(root / "hf", random_hf(CONFIG), CONFIG)
    mj.convert(root / "hf", root / "bf16")
    mj.convert(root / "hf", root / "fp8", dtype="fp8")
    return root


def overview(*paths):
    return gather(*(open_source(path) for path in paths))


def found(seen, *, level=None):
    return [each.text for each in findings(seen) if level in (None, each.level)]


def by_key(seen):
    return {each.key: each for each in seen.weights}


def in_float64(arrays, key, dtype=np.float64):
    """A weight, FP8 dequantised."""
    if arrays[key].dtype != FP8:
        return arrays[key].astype(dtype)
    rows, cols = arrays[key].shape
    scales = np.repeat(np.repeat(arrays[key + SUFFIX], BLOCK[0], 0), BLOCK[1], 1)[:rows, :cols]
    return arrays[key].astype(dtype) * scales.astype(dtype)


def blocks_of(matrix):
    return {
        (i // BLOCK[0], j // BLOCK[1]): matrix[i : i + BLOCK[0], j : j + BLOCK[1]]
        for i, j in itertools.product(range(0, matrix.shape[0], BLOCK[0]), range(0, matrix.shape[1], BLOCK[1]))
    }


def requantised(weight):
    """What quantising by amax changes, squared and summed, in float64."""
    codes, scales = quantize(weight.astype(F32), BLOCK)
    return np.square(in_float64({"": codes, SUFFIX: scales}, "") - weight.astype(np.float64)).sum()
