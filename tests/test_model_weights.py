"""Weights going into models and coming out of them."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hf_model import read_fp8

import minimax_jax as mj
from minimax_jax.models.assign import assign, native_tree
from minimax_jax.models.minimax import MiniMaxForCausalLM
from minimax_jax.models.weights import abstract_weights, check_weights, random_weights
from minimax_jax.synthetic.sizes import TINY


@pytest.fixture(scope="module")
def fp8(tmp_path_factory):
    return read_fp8(tmp_path_factory.mktemp("hf") / "fp8")


def test_paths_shapes_and_dtypes_equal_the_layout():
    model = nnx.eval_shape(lambda: MiniMaxForCausalLM(TINY, random_weights(TINY, jax.random.key(0))))
    expected = mj.specs(TINY).abstract()
    found = native_tree(model)
    assert {name: (leaf.shape, leaf.dtype) for name, leaf in found.items()} == {
        name: (leaf.shape, leaf.dtype) for name, leaf in expected.items()
    }
    paths = nnx.to_flat_state(nnx.state(model)).paths
    assert ("model", "layers", 1, "mlp", "experts", "gate_and_up_projs") in paths


def test_weights_go_in_and_come_out_uncopied(fp8):
    abstract = MiniMaxForCausalLM(TINY, abstract_weights(TINY))
    weights = jax.tree.map(jnp.asarray, fp8.native)
    out = native_tree(assign(abstract, weights))
    assert jax.tree.structure(out) == jax.tree.structure(weights)
    assert all(a is b for a, b in zip(jax.tree.leaves(out), jax.tree.leaves(weights), strict=True))
    assert isinstance(native_tree(abstract)["lm_head.weight"], jax.ShapeDtypeStruct)


def test_assigning_reports_everything_that_is_wrong(fp8):
    wrong = dict(fp8.native)
    first, second = "model.layers.0.", "model.layers.1."
    del wrong[first + "mlp.gate.weight"]
    wrong["model.layers.2.mlp.gate.weight"] = np.zeros((4, 256), np.float32)
    wrong["model.norm.weight"] = np.zeros(255, np.float32)
    wrong["lm_head.weight"] = np.zeros((264, 256), np.int32)
    wrong["model.embed_tokens.weight"] = [1.0]
    wrong[first + "self_attn.q_proj.weight"] = fp8.native[first + "self_attn.q_proj.weight"].values
    experts = fp8.native[first + "mlp.experts.gate_and_up_projs"]
    wrong[first + "mlp.experts.gate_and_up_projs"] = mj.BlockScaled(
        values=experts.values, scale_inv=experts.scale_inv[:, :, :2], parts=1
    )
    wrong[second + "mlp.gate.weight"] = mj.BlockScaled.quantize(jnp.ones((4, 256)))
    with pytest.raises(mj.LayoutError) as caught:
        assign(fp8.model, wrong)
    assert {(problem.what, problem.key) for problem in caught.value.problems} == {
        ("missing tensor", first + "mlp.gate.weight"),
        ("unexpected tensor", "model.layers.2.mlp.gate.weight"),
        ("wrong shape", "model.norm.weight"),
        ("wrong dtype", "lm_head.weight"),
        ("not an array", "model.embed_tokens.weight"),
        ("wrong dtype", first + "self_attn.q_proj.weight"),
        ("wrong blocks of FP8 scales", first + "mlp.experts.gate_and_up_projs"),
        ("wrong dtype", second + "mlp.gate.weight"),
    }


def test_random_weights_fit_the_layout_in_every_dtype():
    for scaled in ("F8_E4M3", "BF16", "F32"):
        weights = jax.eval_shape(functools.partial(random_weights, TINY, scaled=scaled), jax.random.key(0))
        check_weights(weights, TINY)
        expected = abstract_weights(TINY, scaled=scaled)
        assert jax.tree.structure(weights) == jax.tree.structure(expected)
        assert all(a.dtype == b.dtype for a, b in zip(jax.tree.leaves(weights), jax.tree.leaves(expected), strict=True))
