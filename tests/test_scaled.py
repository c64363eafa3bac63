"""BlockScaled: a node of a pytree."""

from __future__ import annotations

import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import bits
from scaled_cases import random_scaled

from minimax_jax.errors import LayoutError
from minimax_jax.ops.fp8 import FP8, dequantize
from minimax_jax.ops.scaled import BlockScaled, dequantize_grouped, group_scaled


def node():
    return random_scaled(np.random.default_rng(6), (3, 40, 24))


def test_properties_are_those_of_the_weights():
    scaled = node()
    assert (scaled.shape, scaled.ndim, scaled.dtype) == ((3, 40, 24), 3, FP8)
    assert scaled.nbytes == 3 * 40 * 24 + 4 * 3 * 3 * 3
    assert repr(scaled) == "BlockScaled(float8_e4m3fn[3, 40, 24], scale_inv=float32[3, 3, 3], block=(16, 8))"
    assert repr(group_scaled([scaled] * 2)).endswith("block=(8, 16), parts=2)")


def test_quantize_and_dequantize_are_those_of_the_codec():
    x = np.random.default_rng(7).standard_normal((2, 40, 48)).astype(np.float32)
    scaled = BlockScaled.quantize(x, block=(16, 16), parts=2)
    assert (scaled.block, scaled.parts) == ((16, 16), 2)
    expected = dequantize(scaled.values, scaled.scale_inv, block=(16, 16), parts=2)
    np.testing.assert_array_equal(bits(scaled.dequantize()), bits(expected))
    again = BlockScaled.quantize(scaled.dequantize(), scaled.scale_inv, block=(16, 16), parts=2)
    np.testing.assert_array_equal(bits(again.values), bits(scaled.values))
    np.testing.assert_allclose(scaled.dequantize(jnp.float32), x, rtol=2**-4, atol=2**-8)


@pytest.mark.parametrize(
    ("values", "scale_inv"),
    [
        (jnp.zeros((16, 8), FP8), jnp.ones((2, 1))),
        (jnp.zeros((16, 8), FP8), jnp.ones((1, 1, 1))),
        (jnp.zeros((16, 8)), jnp.ones((1, 1))),
        (jax.ShapeDtypeStruct((17, 8), FP8), jax.ShapeDtypeStruct((1, 1), jnp.float32)),
    ],
)
def test_building_one_that_does_not_fit_is_refused(values, scale_inv):
    with pytest.raises(LayoutError):
        BlockScaled(values=values, scale_inv=scale_inv, block=(16, 8))


def test_leaves_have_names_and_static_fields_tell_trees_apart():
    leaves, tree = jax.tree.flatten_with_path({"w": node()})
    assert [jax.tree_util.keystr(path) for path, _ in leaves] == ["['w'].values", "['w'].scale_inv"]
    rebuilt = jax.tree.unflatten(tree, [leaf for _, leaf in leaves])["w"]
    assert rebuilt.block == (16, 8)
    assert jax.tree.structure(rebuilt) == jax.tree.structure(node())
    assert jax.tree.structure(rebuilt) != jax.tree.structure(
        random_scaled(np.random.default_rng(0), (3, 40, 24), (8, 8))
    )


@pytest.mark.parametrize(
    "leaf",
    [
        lambda x: None,
        lambda x: x.ndim,
        lambda x: x.sum(dtype=jnp.float32),
        lambda x: x.reshape(-1),
        lambda x: x.sharding,
    ],
)
def test_tree_map_may_put_anything_in_its_leaves(leaf):
    mapped = jax.tree.map(leaf, node())
    assert isinstance(mapped, BlockScaled)
    assert type(mapped.values) is type(leaf(node().values))
    assert repr(mapped).startswith("BlockScaled(")


def test_tree_map_over_experts_gives_a_matrix_that_still_dequantises():
    scaled = node()
    one = jax.tree.map(lambda x: x[1], scaled)
    np.testing.assert_array_equal(bits(one.dequantize()), bits(scaled.dequantize()[1]))


def test_jit_eval_shape_and_abstract_leaves():
    scaled = node()
    same = jax.jit(lambda s: s)(scaled)
    assert isinstance(same, BlockScaled)
    np.testing.assert_array_equal(bits(same.values), bits(scaled.values))
    abstract = jax.eval_shape(lambda s: group_scaled([s, s]), scaled)
    assert isinstance(abstract, BlockScaled)
    assert (abstract.shape, abstract.scale_inv.shape, abstract.nbytes) == ((3, 24, 80), (3, 3, 6), 3 * 24 * 80 + 4 * 54)
    assert jax.eval_shape(lambda s: s.dequantize(), abstract).dtype == jnp.bfloat16


def test_scan_over_experts_sees_one_matrix_at_a_time():
    scaled = node()
    _, weights = jax.lax.scan(lambda carry, one: (carry, one.dequantize()), 0, scaled)
    np.testing.assert_array_equal(bits(weights), bits(scaled.dequantize()))


def test_donated_leaves_are_given_up():
    scaled = node()
    out = jax.jit(lambda s: jax.tree.map(lambda x: x[::-1], s), donate_argnums=0)(scaled)
    assert scaled.values.is_deleted()
    assert scaled.scale_inv.is_deleted()
    assert out.dequantize().shape == (3, 40, 24)


def test_device_put_with_a_tree_of_shardings():
    mesh = jax.make_mesh((8,), ("expert",), axis_types=(jax.sharding.AxisType.Auto,))
    scaled = random_scaled(np.random.default_rng(8), (16, 32, 24))
    share = jax.NamedSharding(mesh, jax.P("expert"))
    placed = jax.device_put(scaled, jax.tree.map(lambda _: share, scaled))
    grouped = jax.jit(dequantize_grouped, static_argnums=1, out_shardings=share)([placed, placed], jnp.bfloat16)
    assert grouped.addressable_shards[3].data.shape == (2, 24, 64)
    np.testing.assert_array_equal(bits(grouped), bits(dequantize_grouped([scaled, scaled], jnp.bfloat16)))


def test_it_is_frozen_and_pickles():
    scaled = node()
    with pytest.raises(AttributeError):
        scaled.block = (1, 1)
    again = pickle.loads(pickle.dumps(scaled))
    np.testing.assert_array_equal(bits(again.values), bits(scaled.values))
