from __future__ import annotations

import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
import torch
from flax import nnx
from hf_model import hf_logits_and_choices, load_hf, logits_and_choices, pair, random_hf, random_ids, read
from transformers.models.minimax_m2.modeling_minimax_m2 import MiniMaxM2RotaryEmbedding, apply_rotary_pos_emb

import minimax_jax as mj
from minimax_jax.models.assign import assign, native_tree
from minimax_jax.models.attention import rotary_angles, rotate
from minimax_jax.models.minimax import MiniMaxForCausalLM
from minimax_jax.models.moe import mix, route
from minimax_jax.models.parts import Fixed
from minimax_jax.models.weights import abstract_weights, check_weights, random_weights
from minimax_jax.synthetic.checkpoint import synthesize
from minimax_jax.synthetic.sizes import REAL, TINY

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
    path = tmp_path_factory.mktemp("hf") / "fp8"
    synthesize(path, TINY)
    config, tensors = read(path)
    native = mj.from_hf(tensors, config, dtype=None)
    model = MiniMaxForCausalLM(config, native, dtype=jnp.float32)
    return SimpleNamespace(path=path, config=config, tensors=tensors, native=native, model=model)


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


def loss_of(model, tokens):
    logits = model(tokens[:, :-1])
    return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()


def test_gradients_reach_every_weight_and_training_lowers_the_loss(tiny):
    tokens = random_ids(4, 12)
    weights = {name: jnp.array(leaf) for name, leaf in tiny.native.items()}
    model = assign(tiny.model, weights)
    optimizer = nnx.Optimizer(model, optax.adamw(1e-2, weight_decay=0.1), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer):
        loss, grads = nnx.value_and_grad(loss_of)(model, tokens)
        with jax.numpy_dtype_promotion("standard"):  # optax needs it
            optimizer.update(model, grads)
        return loss, grads

    first, grads = step(model, optimizer)
    leaves = {".".join(map(str, path)): leaf.get_value() for path, leaf in nnx.to_flat_state(grads)}
    biases = {name for name in weights if name.endswith("e_score_correction_bias")}
    assert leaves.keys() == weights.keys() - biases
    for name, leaf in leaves.items():
        assert np.isfinite(leaf).all(), name
        assert np.abs(leaf).max() > 0, name
    losses = [float(step(model, optimizer)[0]) for _ in range(10)]
    assert losses[-1] < 0.8 * float(first)
    trained = native_tree(model)
    for name in biases:
        np.testing.assert_array_equal(trained[name], tiny.native[name])


def test_gradients_equal_torch(tiny):
    tokens = random_ids(4, 12)
    tiny.hf.zero_grad()
    torch_tokens = torch.from_numpy(tokens).long()
    logits = tiny.hf(torch_tokens[:, :-1]).logits
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), torch_tokens[:, 1:].flatten()).backward()
    grads = {name: parameter.grad.numpy() for name, parameter in tiny.hf.named_parameters()}
    own = nnx.jit(nnx.grad(loss_of))(tiny.model, tokens)
    own = {".".join(map(str, path)): leaf.get_value() for path, leaf in nnx.to_flat_state(own)}
    for name, theirs in grads.items():
        ours = own[name.replace("gate_up_proj", "gate_and_up_projs").replace("down_proj", "down_projs")]
        ours = ours.swapaxes(1, 2) if ours.ndim == 3 else ours
        np.testing.assert_allclose(ours, theirs, rtol=3e-4, atol=3e-7, err_msg=name)  # a quarter of it was seen
    assert len(grads) == len(own)


def test_fp8_weights_are_no_parameters_and_the_rest_trains(fp8):
    tokens = random_ids(2, 12, vocab=fp8.config.vocab_size)
    grads = nnx.jit(nnx.grad(loss_of))(fp8.model, tokens)
    found = {".".join(map(str, path)): leaf.get_value() for path, leaf in nnx.to_flat_state(grads)}
    fixed = {name for name, leaf in fp8.native.items() if isinstance(leaf, mj.BlockScaled) or "bias" in name}
    assert found.keys() == fp8.native.keys() - fixed
    assert all(np.abs(leaf.astype(np.float32)).max() > 0 for leaf in found.values())
    assert len(nnx.to_flat_state(nnx.state(fp8.model, Fixed))) == len(fixed)


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
