"""A model of this library as a Hugging Face checkpoint, judged by what transformers makes of it."""

import logging

import folders
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from flax import nnx
from hf_model import load_hf
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import minimax_jax as mj
from minimax_jax import synthetic
from minimax_jax.errors import JobError, LayoutError, NumericError
from minimax_jax.models.assign import assign, native_tree
from minimax_jax.models.export import save_model
from minimax_jax.models.minimax import MiniMaxForCausalLM
from minimax_jax.models.stack import stack_layers

TOLERANCE = 3e-6
"""Of logits up to 2 in float32, which transformers sums in another order; 7e-7 was seen."""

TOKENS = np.array([[1, 5, 9, 2, 77, 3], [4, 4, 8, 100, 6, 1]])


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("source") / "hf"
    synthetic.synthesize(folder, synthetic.config(layers=2, experts=8))
    return folder


def model_of(source, dtype, *, stacked=False):
    config = mj.MiniMaxConfig.from_pretrained(source)
    native = mj.from_hf(mj.read_tree(source), config, dtype=dtype)
    native = stack_layers(native, config) if stacked else native
    return MiniMaxForCausalLM(config, native, dtype=jnp.float32)


def scales_of(source):
    return mj.source_scales(mj.read_tree(source), mj.MiniMaxConfig.from_pretrained(source))


def tensors(folder):
    return {key: (array.dtype, array.tobytes()) for key, array in folders.arrays(folder).items()}


@pytest.mark.parametrize("stacked", [False, True])
def test_fp8_weights_come_back_byte_for_byte(source, tmp_path, stacked):
    report = save_model(
        model_of(source, None, stacked=stacked), tmp_path / "out", quantization=True, shard_bytes=200_000
    )
    assert tensors(tmp_path / "out") == tensors(source)
    assert report.tensors == len(tensors(source)) and (report.kept_scales, report.fresh_scales) == (0, ())
    assert mj.verify(source, tmp_path / "out", by="bytes").good


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_frozen_weights_keep_their_scales_and_changed_ones_get_real_ones(source, tmp_path, dtype):
    model = model_of(source, dtype)
    weights = native_tree(model)
    changed = "model.layers.1.mlp.experts.down_projs"
    weights[changed] = weights[changed].at[3].multiply(1.37)
    report = save_model(assign(model, weights), tmp_path / "out", quantization=True, scales=scales_of(source))
    assert report.fresh_scales == ("model.layers.1.block_sparse_moe.experts.3.w2.weight",)
    ours, theirs = tensors(tmp_path / "out"), tensors(source)
    different = {key for key in theirs if ours[key] != theirs[key] and "layernorm" not in key and "norm" not in key}
    assert {key for key in different if "proj" in key or "experts" in key} <= {
        report.fresh_scales[0],
        report.fresh_scales[0] + "_scale_inv",
    }
    oracle = mj.to_hf(weights, model.config, quantization=True, scales=scales_of(source))
    for key, array in oracle.items():
        assert folders.arrays(tmp_path / "out")[key].tobytes() == np.asarray(array).tobytes(), key


def test_fp8_weights_are_dequantised_where_floats_are_asked_for(source, tmp_path):
    save_model(model_of(source, None), tmp_path / "out")
    expected = mj.to_hf(native_tree(model_of(source, jnp.bfloat16)), mj.MiniMaxConfig.from_pretrained(source))
    got = folders.arrays(tmp_path / "out")
    assert {key: array.tobytes() for key, array in got.items()} == {
        key: np.asarray(array).tobytes() for key, array in expected.items()
    }


def test_weights_spread_over_devices_keep_every_bit(source, tmp_path):
    model = model_of(source, jnp.bfloat16)
    mesh = jax.make_mesh((8,), ("expert",), axis_types=(AxisType.Auto,))
    weights = native_tree(model)
    negative_zero = "model.layers.0.mlp.experts.gate_and_up_projs"
    weights[negative_zero] = weights[negative_zero].at[:, ::3].set(-0.0)
    spread = {
        name: jax.device_put(leaf, NamedSharding(mesh, PartitionSpec("expert" if ".experts." in name else None)))
        for name, leaf in weights.items()
    }
    save_model(assign(model, spread), tmp_path / "spread")
    save_model(assign(model, weights), tmp_path / "plain")
    assert folders.files(tmp_path / "spread") == folders.files(tmp_path / "plain")


def test_a_trained_model_gives_the_same_logits_in_transformers(source, tmp_path, caplog):
    model = model_of(source, jnp.float32)
    optimizer = nnx.Optimizer(model, optax.sgd(1e-2), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer, tokens):
        def loss(model):
            logits = model(tokens[:, :-1])
            return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()

        value, gradients = nnx.value_and_grad(loss)(model)
        optimizer.update(model, gradients)
        return value

    before = np.asarray(model(jnp.asarray(TOKENS)))
    step(model, optimizer, jnp.asarray(TOKENS))
    ours = np.asarray(model(jnp.asarray(TOKENS)))
    assert np.abs(ours - before).max() > 1e-3
    save_model(model, tmp_path / "out")
    with caplog.at_level(logging.WARNING):
        theirs = load_hf(tmp_path / "out")
    assert not [record.message for record in caplog.records if "weights" in record.message.lower()]
    with torch.no_grad():
        np.testing.assert_allclose(theirs(torch.tensor(TOKENS)).logits.numpy(), ours, rtol=0, atol=TOLERANCE)


def test_an_fp8_export_loads_in_transformers_with_the_same_logits(source, tmp_path):
    model = model_of(source, jnp.float32)
    save_model(model, tmp_path / "out", quantization=True, scales=scales_of(source))
    ours = np.asarray(model(jnp.asarray(TOKENS)))
    with torch.no_grad():
        theirs = load_hf(tmp_path / "out")(torch.tensor(TOKENS)).logits.numpy()
    np.testing.assert_allclose(theirs, ours, rtol=0, atol=TOLERANCE)


def test_what_cannot_be_exported_is_refused_and_nothing_is_left(source, tmp_path):
    model = model_of(source, jnp.bfloat16)
    weights = native_tree(model)
    with pytest.raises(LayoutError, match="not the source scales") as caught:
        save_model(model, tmp_path / "out", quantization=True, scales={"nothing": jnp.ones((1, 1))})
    assert caught.value.problems[0].key == "nothing"
    name = "model.layers.0.self_attn.q_proj.weight"
    poisoned = assign(model, weights | {name: weights[name].at[0, 0].set(jnp.nan)})
    with pytest.raises(NumericError, match="NaN") as caught:
        save_model(poisoned, tmp_path / "out", quantization=True)
    assert caught.value.problems[0].key == name
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "x").touch()
    with pytest.raises(JobError, match="destination exists"):
        save_model(model, tmp_path / "taken")
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]
