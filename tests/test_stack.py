from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from hf_model import read

import minimax_jax as mj
from minimax_jax.models.assign import assign, native_tree
from minimax_jax.models.cache import Cache
from minimax_jax.models.decode import decode_step, prefill
from minimax_jax.models.generate import generate
from minimax_jax.models.minimax import MiniMaxForCausalLM
from minimax_jax.models.stack import stack_layers, unstack_layers
from minimax_jax.models.weights import abstract_weights
from minimax_jax.synthetic.checkpoint import synthesize
from minimax_jax.synthetic.sizes import TINY, config

STEP = 2.0**-7
"""What a number in bfloat16 may be away from its neighbour, of the larger of them."""

LAYERS = 3
SIZES = TINY.replace(num_hidden_layers=LAYERS)
EXPERTS = "model.layers.mlp.experts.gate_and_up_projs"


@pytest.fixture(scope="module")
def native(tmp_path_factory):
    """The weights of a checkpoint, FP8 where they are published so."""
    path = tmp_path_factory.mktemp("stack") / "fp8"
    synthesize(path, SIZES)
    _, tensors = read(path)
    return mj.from_hf(tensors, SIZES, dtype=None)


@pytest.fixture(scope="module")
def models(native):
    """The same weights unrolled and scanned."""
    stacked = stack_layers(native, SIZES)
    return tuple(MiniMaxForCausalLM(SIZES, weights, dtype=jnp.float32) for weights in (native, stacked))


def tokens_of(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, SIZES.vocab_size, shape).astype(np.int32)


def assert_same(left, right):
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for one, other in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(one, other)


def test_stacking_puts_the_layers_in_order_and_comes_back(native):
    stacked = stack_layers(native, SIZES)
    assert len(stacked) == 3 + (len(native) - 3) // LAYERS
    assert stacked["lm_head.weight"] is native["lm_head.weight"]
    experts = stacked[EXPERTS]
    assert isinstance(experts, mj.BlockScaled)
    assert (experts.shape, experts.block, experts.parts) == ((LAYERS, 4, 256, 144), (128, 128), 2)
    for layer in range(LAYERS):
        own = native[EXPERTS.replace("layers", f"layers.{layer}")]
        np.testing.assert_array_equal(experts.dequantize()[layer], own.dequantize())
    assert_same(unstack_layers(stacked, SIZES), native)


def test_stacking_works_on_numpy_under_jit_and_on_shapes(native):
    expected = stack_layers(native, SIZES)
    assert_same(stack_layers(jax.tree.map(np.asarray, native), SIZES), expected)
    stack = functools.partial(stack_layers, config=SIZES)
    unstack = functools.partial(unstack_layers, config=SIZES)
    assert jax.tree.structure(jax.eval_shape(stack, native)) == jax.tree.structure(expected)
    assert jax.eval_shape(unstack, abstract_weights(SIZES, stacked=True)).keys() == native.keys()
    assert_same(jax.jit(lambda tree: unstack(stack(tree)))(native), native)


def test_trees_that_cannot_be_stacked_are_refused_with_every_problem(native):
    wrong = dict(native)
    del wrong["model.layers.0.mlp.gate.weight"]
    wrong["model.layers.3.mlp.gate.weight"] = wrong["model.layers.1.mlp.gate.weight"]
    with pytest.raises(mj.LayoutError) as caught:
        stack_layers(wrong, SIZES)
    assert {problem.key for problem in caught.value.problems} == wrong.keys() ^ native.keys()
    name = "model.layers.1.self_attn.q_proj.weight"
    wrong = native | {name: native[name].dequantize(), "model.layers.2.input_layernorm.weight": jnp.ones(3)}
    with pytest.raises(mj.LayoutError, match="cannot be stacked with model") as caught:
        stack_layers(wrong, SIZES)
    assert len(caught.value.problems) == 2
    with pytest.raises(mj.LayoutError, match="a leading axis of 3 layers"):
        unstack_layers(stack_layers(native, SIZES) | {"model.layers.input_layernorm.weight": jnp.ones((2, 256))}, SIZES)
    with pytest.raises(mj.LayoutError, match="missing tensor"):
        unstack_layers(native, SIZES)


def test_the_scanned_model_equals_the_unrolled_one(models):
    tokens = tokens_of(3, 13)
    run = jax.jit(lambda model: (model.model(tokens), model(tokens)))
    (plain, logits), (scanned, scanned_logits) = map(run, models)
    np.testing.assert_allclose(scanned_logits, logits, rtol=0, atol=2e-6)  # of up to 1.1, 4.5e-7 was seen
    np.testing.assert_array_equal(scanned.chosen, plain.chosen)
    assert np.abs(logits).max() > 0.1


def test_the_scanned_model_generates_the_same_text(models):
    plain, scanned = (generate(model, tokens_of(2, 5), [5, 2], max_new_tokens=12).tokens for model in models)
    np.testing.assert_array_equal(plain, scanned)
    assert len(np.unique(plain)) > 6


def test_gradients_of_the_scanned_model_are_those_of_the_unrolled_one_stacked(models):
    tokens = tokens_of(2, 9)

    @nnx.jit
    @nnx.grad
    def gradient(model):
        return optax.softmax_cross_entropy_with_integer_labels(model(tokens[:, :-1]), tokens[:, 1:]).mean()

    plain, scanned = (
        {".".join(map(str, path)): leaf.get_value() for path, leaf in nnx.to_flat_state(gradient(model))}
        for model in models
    )
    name = "model.layers.{}self_attn.q_norm.weight"
    expected = np.stack([plain[name.format(f"{layer}.")] for layer in range(LAYERS)])
    assert (np.abs(expected).max(axis=1) > 0).all()
    np.testing.assert_allclose(
        scanned[name.format("")].astype(np.float32), expected.astype(np.float32), rtol=STEP, atol=1e-7
    )
    assert EXPERTS not in scanned
    np.testing.assert_allclose(scanned["lm_head.weight"], plain["lm_head.weight"], rtol=STEP, atol=1e-7)


def test_weights_of_the_scanned_model_come_out_stacked_and_go_in_stacked(native, models):
    assert_same(unstack_layers(native_tree(models[1]), SIZES), native)
    with pytest.raises(mj.LayoutError, match="missing tensor"):
        assign(models[1], native)
    with pytest.raises(mj.LayoutError, match="missing tensor"):
        assign(models[0], stack_layers(native, SIZES))


def train(model, tokens):
    return nnx.grad(lambda model: model(tokens).mean())(model)


@pytest.mark.parametrize("stacked", [False, True], ids=["unrolled", "scanned"])
def test_at_most_one_layer_is_dequantised_at_a_time(stacked):
    """Temporaries of programs of three layers, against the experts of one layer in float32."""
    sizes = config(layers=3, experts=16, hidden_size=256, intermediate_size=256)
    one_layer = 16 * 3 * 256 * 256 * 4
    weights = abstract_weights(sizes, scaled="F8_E4M3", stacked=stacked)
    model = MiniMaxForCausalLM(sizes, weights, dtype=jnp.float32)
    cache = jax.eval_shape(lambda: Cache.empty(sizes, 2, 16, jnp.float32))
    assert temporary_bytes(prefill, model, ids(2, 12), ids(2), cache) < one_layer
    # One expert after the other, and no copy of a layer's codes:
    assert temporary_bytes(decode_step, model, ids(2), ids(2), cache) < 0.1 * one_layer
    if stacked:
        assert temporary_bytes(train, model, ids(2, 12)) < 2 * one_layer


def temporary_bytes(function, *arguments) -> int:
    """Of the program for a CPU; how well the loops in it are compiled does not matter to them."""
    program = jax.jit(function).lower(*arguments).compile({"xla_backend_optimization_level": 0})
    return program.memory_analysis().temp_size_in_bytes


def ids(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.int32)
