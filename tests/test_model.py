"""The model beside transformers' own."""

from __future__ import annotations

import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch
from hf_model import hf_logits_and_choices, load_hf, logits_and_choices, pair, random_hf, random_ids, read, read_fp8
from transformers.models.minimax_m2.modeling_minimax_m2 import MiniMaxM2RotaryEmbedding, apply_rotary_pos_emb

import minimax_jax as mj
from minimax_jax.models.assign import assign
from minimax_jax.models.attention import rotary_angles, rotate
from minimax_jax.models.minimax import MiniMaxForCausalLM
from minimax_jax.models.moe import mix, route
from minimax_jax.synthetic.sizes import REAL

TOLERANCE = 2e-5
"""Of logits up to 7 in float32, which differ by the order of sums alone; 7e-6 was seen."""

SHAPES = {
    "half rotated, 2 query heads a KV head, top 2": {},
    "all rotated, 1 query head a KV head, top 1, tied": {
        "rotated": 1.0,
        "num_key_value_heads": 4,
        "num_experts_per_tok": 1,
        "tie_word_embeddings": True,
    },
    "quarter rotated, 4 query heads a KV head, top 4": {
        "rotated": 0.25,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "num_experts_per_tok": 4,
        "num_hidden_layers": 1,
    },
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return pair(tmp_path_factory.mktemp("hf"))


@pytest.fixture(scope="module")
def fp8(tmp_path_factory):
    return read_fp8(tmp_path_factory.mktemp("hf") / "fp8")


@pytest.mark.parametrize("changes", SHAPES.values(), ids=SHAPES)
def test_logits_and_router_choices_equal_transformers(changes, tmp_path):
    both = pair(tmp_path, **changes)
    tokens = random_ids(3, 17)
    logits, chosen = logits_and_choices(both.model, tokens)
    expected, experts = hf_logits_and_choices(both.hf, tokens)
    assert logits.dtype == jnp.float32
    assert np.abs(expected).max() > 1
    np.testing.assert_allclose(logits, expected, rtol=0, atol=TOLERANCE)
    np.testing.assert_array_equal(np.sort(chosen, axis=-1), np.sort(experts, axis=-1))
    assert len(np.unique(experts)) > 3


def test_fp8_source_equals_transformers_on_the_dequantised_weights(fp8):
    tokens = random_ids(2, 16, vocab=fp8.config.vocab_size)
    logits, chosen = logits_and_choices(fp8.model, tokens)
    expected, experts = hf_logits_and_choices(load_hf(fp8.path), tokens)
    assert np.abs(expected).max() > 0.1
    np.testing.assert_allclose(logits, expected, rtol=0, atol=TOLERANCE)
    np.testing.assert_array_equal(np.sort(chosen, axis=-1), np.sort(experts, axis=-1))


def test_fp8_on_device_equals_dequantised(fp8):
    tokens = random_ids(2, 16, vocab=fp8.config.vocab_size)
    native = mj.from_hf(fp8.tensors, fp8.config, dtype=jnp.float32)
    scaled = [name for name, leaf in fp8.native.items() if isinstance(leaf, mj.BlockScaled)]
    assert len(scaled) == 6 * fp8.config.num_hidden_layers
    logits, chosen = logits_and_choices(fp8.model, tokens)
    expected, experts = logits_and_choices(MiniMaxForCausalLM(fp8.config, native, dtype=jnp.float32), tokens)
    np.testing.assert_allclose(logits, expected, rtol=0, atol=TOLERANCE)
    np.testing.assert_array_equal(chosen, experts)


def test_bf16_source_equals_transformers(tmp_path):
    random_hf(seed=1).to(torch.bfloat16).save_pretrained(tmp_path)
    config, tensors = read(tmp_path)
    native = mj.from_hf(tensors, config, dtype=jnp.bfloat16)
    assert {leaf.dtype for leaf in native.values()} == {jnp.dtype(jnp.bfloat16)}
    tokens = random_ids(3, 17)
    logits, chosen = logits_and_choices(MiniMaxForCausalLM(config, native, dtype=jnp.float32), tokens)
    expected, experts = hf_logits_and_choices(load_hf(tmp_path), tokens)
    np.testing.assert_allclose(logits, expected, rtol=0, atol=TOLERANCE)
    np.testing.assert_array_equal(np.sort(chosen, axis=-1), np.sort(experts, axis=-1))


def test_bf16_activations_are_as_close_to_the_truth_as_transformers(tiny):
    tokens = random_ids(3, 17)
    truth, _ = hf_logits_and_choices(tiny.hf, tokens)
    theirs, _ = hf_logits_and_choices(random_hf().to(torch.bfloat16), tokens)
    native = {name: leaf.astype(jnp.bfloat16) for name, leaf in tiny.native.items()}
    ours, _ = logits_and_choices(MiniMaxForCausalLM(tiny.config, native), tokens)
    assert ours.dtype == jnp.float32
    assert 1e-4 < np.abs(ours - truth).mean() < 1.1 * np.abs(theirs - truth).mean()


def test_rotation_equals_transformers_at_far_positions():
    far = np.array([[0, 1, 1000, 131_071, 196_607]])
    rope = {"rope_type": "default", "rope_theta": REAL.rope_theta, "partial_rotary_factor": 0.5}
    rotary = MiniMaxM2RotaryEmbedding(SimpleNamespace(head_dim=128, max_position_embeddings=1, rope_parameters=rope))
    x = np.random.default_rng(0).standard_normal((1, 5, 3, 128)).astype(np.float32)
    heads = torch.from_numpy(x).transpose(1, 2)
    expected, _ = apply_rotary_pos_emb(heads, heads, *rotary(heads, torch.from_numpy(far)))
    ours = rotate(jnp.asarray(x), *rotary_angles(jnp.asarray(far, jnp.int32), REAL))
    # An angle of 2e5 / 1.27 has 2**-7 between neighbours in float32, and the two may round it differently.
    np.testing.assert_allclose(ours, expected.transpose(1, 2), rtol=0, atol=0.05)
    np.testing.assert_allclose(ours[:, :3], expected.transpose(1, 2)[:, :3], rtol=0, atol=3e-4)  # 1000: 2**-14
    np.testing.assert_array_equal(ours[..., REAL.rotary_dim :], x[..., REAL.rotary_dim :])


def test_the_bias_chooses_and_does_not_weight():
    rng = np.random.default_rng(0)
    x, weight, bias = rng.standard_normal((40, 16)), rng.standard_normal((8, 16)), rng.standard_normal(8)
    x = x.astype(ml_dtypes.bfloat16)
    chosen, shares = route(jnp.asarray(x), jnp.float32(weight), jnp.float32(bias), 3)
    scores = 1 / (1 + np.exp(-x.astype(np.float64) @ weight.T))
    expected = np.argsort(-(scores + bias), axis=1)[:, :3]
    np.testing.assert_array_equal(chosen, expected)
    assert (np.sort(expected) != np.sort(np.argsort(-scores, axis=1)[:, :3])).any()
    kept = np.take_along_axis(scores, expected, axis=1)
    np.testing.assert_allclose(shares, kept / kept.sum(axis=1, keepdims=True), rtol=3e-6)  # 7e-7 was seen


def test_no_product_of_float32_is_left_to_hardware_that_rounds_it(tiny):
    """With bfloat16 activations, float32 stands only where it matters, such as in the router and the positions."""
    model = MiniMaxForCausalLM(tiny.config, tiny.native)
    lowered = jax.jit(model.__call__).trace(jax.ShapeDtypeStruct((2, 5), jnp.int32)).lower(lowering_platforms=("tpu",))
    products = [line for line in lowered.as_text().splitlines() if "dot_general" in line]
    wide = [line for line in products if "bf16" not in line]
    assert len(products) > len(wide) == tiny.config.num_hidden_layers
    assert all("precision = [HIGHEST, HIGHEST]" in line for line in wide)


@pytest.mark.parametrize("tokens", [2, 40], ids=["picked", "grouped"])
def test_experts_equal_the_formula_and_add_up_over_shares_of_them(tokens):
    rng = np.random.default_rng(0)
    x, w1, w2 = (rng.standard_normal(shape) for shape in ((tokens, 16), (24, 16, 20), (24, 10, 16)))
    chosen = rng.permuted(np.tile(np.arange(24), (tokens, 1)), axis=1)[:, :3]
    shares = rng.random((tokens, 3))
    expected = np.zeros_like(x)
    for row in range(tokens):
        for expert, share in zip(chosen[row], shares[row], strict=True):
            gate, up = np.split(x[row] @ w1[expert], 2)
            expected[row] += share * ((gate / (1 + np.exp(-gate)) * up) @ w2[expert])
    x, shares, w1, w2 = (jnp.asarray(array, jnp.float32) for array in (x, shares, w1, w2))
    run = jax.jit(functools.partial(mix, x, jnp.asarray(chosen), shares))
    bound = 1e-6 * np.abs(expected).max()  # 1.4e-7 was seen
    np.testing.assert_allclose(run(w1, w2), expected, rtol=0, atol=bound)
    parts = [run(w1[i : i + 12], w2[i : i + 12], first=i) for i in (0, 12)]
    np.testing.assert_allclose(parts[0] + parts[1], expected, rtol=0, atol=bound)


def test_sharded_experts_give_the_same_logits(fp8):
    mesh = jax.make_mesh((4,), ("expert",), axis_types=(jax.sharding.AxisType.Auto,))
    table = mj.specs(fp8.config).by_native

    def put(name, leaf):
        axes = ["expert" if axis == "expert" else None for axis in table[name].row.native_axes]
        return jax.device_put(leaf, jax.NamedSharding(mesh, jax.P(*axes)))

    sharded = assign(fp8.model, {name: put(name, leaf) for name, leaf in fp8.native.items()})
    tokens = random_ids(2, 16, vocab=fp8.config.vocab_size)
    expected, experts = logits_and_choices(fp8.model, tokens)
    logits, chosen = logits_and_choices(sharded, tokens)
    np.testing.assert_allclose(logits, expected, rtol=0, atol=TOLERANCE)
    np.testing.assert_array_equal(chosen, experts)
