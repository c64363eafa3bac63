"""Every function lowers for every platform, at any size; the real sizes are abstract here."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

from minimax_jax.ops.checks import grid_shape
from minimax_jax.ops.experts import group, ungroup
from minimax_jax.ops.fp8 import FP8, dequantize, quantize, requantize
from minimax_jax.ops.scaled import BlockScaled, dequantize_grouped, group_scaled, ungroup_scaled

PLATFORMS = ("cpu", "cuda", "rocm", "tpu")
BLOCK = (128, 128)
MATRIX = (4, 256, 384)
RAGGED = (4, 192, 200)
GATE_UP = (256, 3072, 3072)  # experts, hidden, 2*inter of one real layer


def array(shape, dtype):
    return jax.ShapeDtypeStruct(shape, dtype)


def scaled(shape, parts=1):
    grid = grid_shape(shape, BLOCK, parts=parts)
    return BlockScaled(values=array(shape, FP8), scale_inv=array(grid, jnp.float32), parts=parts)


def dequantize_at(node, row, col):
    return dequantize(node.values, node.scale_inv, offset=(row, col))


def weights(shape, dtype=jnp.bfloat16):
    return array(shape, dtype)


def scales(shape):
    return array(grid_shape(shape, BLOCK), jnp.float32)


INT = array((), jnp.int32)
CASES = {
    "dequantize": (lambda s: s.dequantize(), (scaled(MATRIX),)),
    "dequantize to float32": (lambda s: s.dequantize(jnp.float32), (scaled(MATRIX),)),
    "dequantize to float16": (lambda s: s.dequantize(jnp.float16), (scaled(MATRIX),)),
    "dequantize ragged": (lambda s: s.dequantize(), (scaled(RAGGED),)),
    "dequantize ragged parts": (lambda s: s.dequantize(), (scaled(RAGGED, parts=2),)),
    "dequantize traced offset": (dequantize_at, (scaled(MATRIX), INT, INT)),
    "quantize": (quantize, (weights(MATRIX),)),
    "quantize float32": (quantize, (weights(MATRIX, jnp.float32),)),
    "quantize float16": (quantize, (weights(MATRIX, jnp.float16),)),
    "quantize ragged": (quantize, (weights(RAGGED),)),
    "quantize given": (quantize, (weights(MATRIX), scales(MATRIX))),
    "requantize": (lambda x, s: requantize(x, s, block=BLOCK), (weights(MATRIX), scales(MATRIX))),
    "group": (group, ([weights(MATRIX)] * 2,)),
    "ungroup": (lambda x: ungroup(x, 2), (weights(MATRIX),)),
    "group_scaled": (group_scaled, ([scaled(RAGGED)] * 2,)),
    "ungroup_scaled": (ungroup_scaled, (scaled(RAGGED, parts=2),)),
    "dequantize_grouped": (dequantize_grouped, ([scaled(MATRIX)] * 2,)),
    "dequantize_grouped ragged": (dequantize_grouped, ([scaled(RAGGED)] * 2,)),
}


@pytest.mark.parametrize("name", CASES)
def test_exports_for_every_platform(name):
    function, arguments = CASES[name]
    exported = export.export(jax.jit(function), platforms=PLATFORMS)(*arguments)
    assert exported.platforms == PLATFORMS
    expected = jax.tree.leaves(jax.eval_shape(function, *arguments))
    assert [(a.shape, a.dtype) for a in exported.out_avals] == [(a.shape, a.dtype) for a in expected]


HALF = (256, 1536, 3072)
REAL = {
    "dequantize": (lambda s: s.dequantize(), (scaled(GATE_UP, parts=2),), GATE_UP),
    "dequantize_grouped": (dequantize_grouped, ([scaled(HALF)] * 2,), GATE_UP),
    "group_scaled": (group_scaled, ([scaled(HALF)] * 2,), GATE_UP),
    "quantize": (lambda x: quantize(x, parts=2), (weights(GATE_UP),), GATE_UP),
    "requantize": (lambda x, s: requantize(x, s, block=BLOCK), (weights(GATE_UP), scales(GATE_UP)), GATE_UP),
    "ungroup_scaled": (ungroup_scaled, (scaled(GATE_UP, parts=2),), HALF),
}


@pytest.mark.parametrize("name", REAL)
def test_real_grouped_layer_above_int32_max_elements_exports(name):
    function, arguments, shape = REAL[name]
    assert np.prod(GATE_UP, dtype=np.int64) > np.iinfo(np.int32).max
    exported = export.export(jax.jit(function), platforms=PLATFORMS)(*arguments)
    assert exported.out_avals[0].shape == shape
