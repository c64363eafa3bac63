"""What the kernels on the host leave to XLA, and what becomes of it."""

import jax
import numpy as np
import pytest
from helpers import BF16, F32, bits
from kernel_cases import (
    FLOATS,
    SOURCES,
    assert_covered_and_same,
    assert_same,
    by_xla,
    require_kernels,
    scaled_experts,
    source_of,
    weights,
)

from minimax_jax.ops import host, host_matrices
from minimax_jax.ops.assemble import assemble, split
from minimax_jax.ops.fp8 import FP8

require_kernels()


@pytest.fixture(autouse=True)
def asked(monkeypatch):
    monkeypatch.setenv(host.VARIABLE, "numba")


@pytest.mark.parametrize("scale", [np.nan, np.inf, 2.0**-120, 2.0**120, 1e-40])
def test_scales_that_are_not_ordinary_are_left_to_xla(scale):
    tree = scaled_experts(np.random.default_rng(5), 2, 2, 16, 16, (8, 8))
    tree[1][0].scale_inv[1, 1] = scale
    assert host_matrices.assemble(tree, BF16) is None
    assert_same(assemble(tree, BF16), by_xla(assemble, tree, BF16))
    grouped = assemble(tree, None)
    assert host_matrices.split(grouped, 2, F32, block=(8, 8), source=None) is None
    assert host_matrices.encode(grouped, F32, block=(8, 8), parts=2, source=None) is None


@pytest.mark.parametrize("scale", [0.0, -0.0, -0.5])
def test_zero_and_negative_scales(scale):
    tree = scaled_experts(np.random.default_rng(6), 2, 2, 16, 16, (8, 8))
    tree[1][0].scale_inv[1, 1] = scale
    assert_covered_and_same(assemble, host_matrices.assemble, tree, BF16)
    x = weights(np.random.default_rng(6), BF16, 2, 16, 32)
    source = np.full((2, 2, 4), scale, np.float32)
    assert host_matrices.split(x, 2, FP8, block=(8, 8), source=source) is None
    assert_same(split(x, 2, FP8, block=(8, 8), source=source), by_xla(split, x, 2, FP8, block=(8, 8), source=source))


@FLOATS
@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
@SOURCES
def test_weights_that_are_not_finite_are_left_to_xla(dtype, poison, source):
    x = weights(np.random.default_rng(8), dtype, 2, 16, 32)
    given = source_of(source, x, (8, 8), 2)
    x[1, 3, 5] = poison
    assert host_matrices.split(x, 2, FP8, block=(8, 8), source=given) is None
    got = split(x, 2, FP8, block=(8, 8), source=given)
    assert_same(got, by_xla(split, x, 2, FP8, block=(8, 8), source=given))
    assert np.isnan(got[1][0].scale_inv).any()


def test_blocks_of_zeros_have_a_scale_of_one():
    x = np.zeros((1, 16, 32), BF16)
    x[0, :, ::2] = -0.0
    ((scaled, _),) = assert_covered_and_same(split, host_matrices.split, x, 2, FP8, block=(8, 8), source=None)
    assert np.all(scaled.scale_inv == 1)
    assert set(bits(scaled.values).flat) == {0, 0x80}


def test_weights_too_small_for_ordinary_scales_are_left_to_xla():
    x = np.full((1, 16, 32), 2.0**-105, np.float32)
    assert host_matrices.split(x, 2, FP8, block=(8, 8), source=None) is None
    assert_same(split(x, 2, FP8, block=(8, 8)), by_xla(split, x, 2, FP8, block=(8, 8)))


def test_traced_arrays_are_left_to_xla():
    tree = scaled_experts(np.random.default_rng(9), 2, 2, 16, 16, (8, 8))
    want = assemble(tree, BF16)
    assert_same(jax.jit(lambda tree: assemble(tree, BF16))(tree), want)
    assert jax.eval_shape(lambda tree: assemble(tree, BF16), tree).shape == want.shape


def test_wrong_scales_reach_no_kernel():
    tree = scaled_experts(np.random.default_rng(10), 1, 1, 16, 16, (8, 8))
    node = jax.tree.unflatten(jax.tree.structure(tree[0][0]), [tree[0][0].values, np.ones((1, 1), np.float32)])
    assert host_matrices.assemble([[node]], BF16) is None
    assert host_matrices.encode(node, BF16, block=(8, 8), parts=1, source=None) is None


def test_mixed_and_empty_experts_reach_no_kernel():
    eight = np.zeros((8, 8), np.float32)
    for tree in ([[eight, eight], [eight]], [[eight], [eight.astype(BF16)]], [[np.zeros((0, 8), np.float32)]], [[]]):
        assert host_matrices.assemble(tree, None) is None
    assert host_matrices.split(eight[None], 3, None, block=(8, 8), source=None) is None


def test_sharded_arrays_are_left_to_xla():
    mesh = jax.make_mesh((2,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    sharded = jax.device_put(np.zeros((2, 16, 32), np.float32), jax.NamedSharding(mesh, jax.P("x")))
    assert host_matrices.split(sharded, 2, None, block=(8, 8), source=None) is None
