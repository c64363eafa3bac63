"""Gradients of the model beside torch's own, and training by them."""

from __future__ import annotations

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from flax import nnx
from hf_model import pair, random_ids, read_fp8

import minimax_jax as mj
from minimax_jax.models.assign import assign, native_tree
from minimax_jax.models.parts import Fixed


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return pair(tmp_path_factory.mktemp("hf"))


@pytest.fixture(scope="module")
def fp8(tmp_path_factory):
    return read_fp8(tmp_path_factory.mktemp("hf") / "fp8")


def loss_of(model, tokens):
    logits = model(tokens[:, :-1])
    return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()


def by_name(state):
    return {".".join(map(str, path)): leaf.get_value() for path, leaf in nnx.to_flat_state(state)}


@pytest.fixture(scope="module")
def training(tiny):
    """Eleven steps from the model of `tiny`: its first gradients by name, all losses, and the weights afterwards."""
    tokens = random_ids(4, 12)
    model = assign(tiny.model, {name: jnp.array(leaf) for name, leaf in tiny.native.items()})
    optimizer = nnx.Optimizer(model, optax.adamw(1e-2, weight_decay=0.1), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer):
        loss, grads = nnx.value_and_grad(loss_of)(model, tokens)
        with jax.numpy_dtype_promotion("standard"):  # optax needs it
            optimizer.update(model, grads)
        return loss, grads

    first, grads = step(model, optimizer)
    losses = [float(first), *(float(step(model, optimizer)[0]) for _ in range(10))]
    return SimpleNamespace(tokens=tokens, gradients=by_name(grads), losses=losses, weights=native_tree(model))


def test_gradients_reach_every_weight_and_training_lowers_the_loss(tiny, training):
    biases = {name for name in tiny.native if name.endswith("e_score_correction_bias")}
    assert training.gradients.keys() == tiny.native.keys() - biases
    for name, leaf in training.gradients.items():
        assert np.isfinite(leaf).all(), name
        assert np.abs(leaf).max() > 0, name
    assert training.losses[-1] < 0.8 * training.losses[0]
    for name in biases:
        np.testing.assert_array_equal(training.weights[name], tiny.native[name])


def test_gradients_equal_torch(tiny, training):
    tiny.hf.zero_grad()
    tokens = torch.from_numpy(training.tokens).long()
    logits = tiny.hf(tokens[:, :-1]).logits
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).backward()
    grads = {name: parameter.grad.numpy() for name, parameter in tiny.hf.named_parameters()}
    for name, theirs in grads.items():
        ours = training.gradients[name.replace("gate_up_proj", "gate_and_up_projs").replace("down_proj", "down_projs")]
        ours = ours.swapaxes(1, 2) if ours.ndim == 3 else ours
        np.testing.assert_allclose(ours, theirs, rtol=3e-4, atol=3e-7, err_msg=name)  # a quarter of it was seen
    assert len(grads) == len(training.gradients)


def test_fp8_weights_are_no_parameters_and_the_rest_trains(fp8):
    tokens = random_ids(2, 12, vocab=fp8.config.vocab_size)
    found = by_name(nnx.jit(nnx.grad(loss_of))(fp8.model, tokens))
    fixed = {name for name, leaf in fp8.native.items() if isinstance(leaf, mj.BlockScaled) or "bias" in name}
    assert found.keys() == fp8.native.keys() - fixed
    assert all(np.abs(leaf.astype(np.float32)).max() > 0 for leaf in found.values())
    assert len(nnx.to_flat_state(nnx.state(fp8.model, Fixed))) == len(fixed)
