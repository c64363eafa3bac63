import json
import warnings

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from helpers import BF16, F32, FP8, SUFFIX, bits, differences, random_hf
from lora_cases import CFG, EXPERTS, HIDDEN, LAYERS, MANY, MLP, PEFT, RANK, W1, keys_of, random_lora, tiny_model
from safetensors.numpy import save_file
from torch_helpers import in_numpy, in_torch, to_numpy

import minimax_jax as mj
from minimax_jax.errors import LayoutError, NumericError
from minimax_jax.lora import from_param_wrapper, group_lora, merge_lora, to_param_wrapper, ungroup_lora

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import peft


# --- beside PEFT ----------------------------------------------------------------------------------------------------


def weights_of(model):
    """A transformers model's weights as a native tree: its fused experts, transposed."""
    native = {}
    for key, tensor in model.state_dict().items():
        array, name = to_numpy(tensor), key.replace(".e_score_correction_bias", ".gate.e_score_correction_bias")
        for fused, grouped in (("gate_up_proj", "gate_and_up_projs"), ("down_proj", "down_projs")):
            if name.endswith("experts." + fused):
                name, array = name.replace(fused, grouped), np.ascontiguousarray(array.swapaxes(1, 2))
        native[name] = array
    return native


def adapt(model, tree, **options):
    """PEFT's model with a wrapped adapter, and every other LoRA, loaded strictly."""
    config = peft.LoraConfig(target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"], **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = peft.get_peft_model(model, config)
        result = peft.set_peft_model_state_dict(adapted, in_torch(tree))
    assert not result.unexpected_keys and not [key for key in result.missing_keys if "lora" in key]
    return adapted


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 5e-7), (torch.bfloat16, 8e-3)])
def test_merged_weights_equal_pefts(dtype, bound):
    tree = random_lora(dtype=F32 if dtype is torch.float32 else BF16)
    modules = ("self_attn.q_proj", HIDDEN, 2 * 8), ("self_attn.o_proj", 2 * 8, HIDDEN)
    for module, cols, rows in modules:
        for layer in range(LAYERS):
            name = f"{PEFT}model.layers.{layer}.{module}.lora_"
            tree[name + "A.weight"] = np.full((RANK, cols), 0.25, F32).astype(tree[W1].dtype)
            tree[name + "B.weight"] = np.full((rows, RANK), 0.5, F32).astype(tree[W1].dtype)
    grouped = group_lora(tree, CFG)
    native = weights_of(tiny_model(dtype))
    merged = merge_lora(native, grouped, CFG, scaling=5 / RANK)
    model = adapt(
        tiny_model(dtype), to_param_wrapper(grouped, CFG), r=RANK, lora_alpha=5, target_modules=["q_proj", "o_proj"]
    )
    want = weights_of(model.merge_and_unload())
    assert merged.keys() == want.keys() == native.keys()
    changed = {key for key in native if not np.array_equal(bits(merged[key]), bits(native[key]))}
    assert changed == {key for key in native if "experts" in key or "q_proj" in key or "o_proj" in key}
    for key, weight in want.items():
        got, weight = np.asarray(merged[key], np.float64), np.asarray(weight, np.float64)
        assert np.abs(got - weight).max() <= bound * np.abs(weight).max(), key
        assert merged[key].dtype == native[key].dtype


def test_peft_loads_the_published_names_as_we_concatenate_them(tmp_path):
    tree = random_lora(shared=False)
    options = {"r": RANK, "lora_alpha": 5, "target_modules": ["w1", "w2", "w3"], "peft_type": "LORA"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(options | {"task_type": "CAUSAL_LM"}))
    save_file(tree, tmp_path / "adapter_model.safetensors")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.PeftModel.from_pretrained(tiny_model(), tmp_path)
    want = in_numpy(peft.get_peft_model_state_dict(model))
    wrapped = to_param_wrapper(group_lora(tree, CFG, concatenate=True), CFG)
    assert wrapped.keys() == want.keys()
    gate_up = {key for key in want if "base_layer" in key}
    assert len(gate_up) == 2 * LAYERS
    assert not differences({key: wrapped[key] for key in gate_up}, {key: want[key] for key in gate_up})

    merged = merge_lora(weights_of(tiny_model()), group_lora(tree, CFG, concatenate=True), CFG, scaling=5 / RANK)
    for key, weight in weights_of(model.merge_and_unload()).items():
        np.testing.assert_allclose(np.asarray(merged[key]), weight, rtol=1e-6, atol=1e-6)  # no difference was seen


def test_peft_runs_a_concatenated_adapter_at_twice_rank_and_alpha():
    tree = random_lora(shared=False)
    grouped = group_lora(tree, CFG, concatenate=True)
    model = adapt(tiny_model(), to_param_wrapper(grouped, CFG), r=2 * RANK, lora_alpha=2 * 5)
    merged = merge_lora(weights_of(tiny_model()), grouped, CFG, scaling=5 / RANK)
    for key, weight in weights_of(model.merge_and_unload()).items():
        np.testing.assert_allclose(np.asarray(merged[key]), weight, rtol=1e-6, atol=1e-6)  # no difference was seen


# --- merging --------------------------------------------------------------------------------------------------------


def exact_sum(weight, a, b, scaling):
    return weight.astype(np.float64) + np.float64(np.float32(scaling)) * (a.astype(np.float64) @ b.astype(np.float64))


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_merging_is_the_exact_sum_rounded_once(dtype):
    native = mj.from_hf(random_hf(CFG), CFG, dtype=dtype)
    lora = group_lora(random_lora(dtype=BF16), CFG)
    merged = merge_lora(native, lora, CFG, scaling=0.3)
    jitted = jax.jit(lambda n, x: merge_lora(n, x, CFG, scaling=0.3))(native, lora)
    for name, side in (("gate_and_up_projs", "lora_gate_and_up_"), ("down_projs", "lora_down_")):
        a, b = (np.asarray(lora[PEFT + MLP + side + s]) for s in "AB")
        want = exact_sum(np.asarray(native[MLP + name]), a, b, 0.3)
        half_ulp = 2.0**-8 if dtype == BF16 else 2.0**-24
        for tree in (merged, jitted):
            off = np.abs(np.asarray(tree[MLP + name], np.float64) - want)
            assert (off <= 1.001 * half_ulp * np.abs(want) + 1e-6).all()
    assert merged["model.norm.weight"] is native["model.norm.weight"]
    assert native.keys() == merged.keys()


def test_fp8_weights_stay_fp8_and_those_without_change_keep_their_codes():
    hf = random_hf(CFG)
    for expert in range(EXPERTS):
        bits(hf[f"model.layers.0.block_sparse_moe.experts.{expert}.w2.weight"])[0, 0] = 0x80
    native = mj.from_hf(hf, CFG, dtype=None)
    lora = {key: np.array(array) for key, array in group_lora(random_lora(), CFG).items()}
    lora[PEFT + MLP + "lora_down_B"][[0, 2, 3]] = 0
    merged = merge_lora(native, lora, CFG, scaling=0.01)
    back = mj.to_hf(merged, CFG, quantization=True)
    changed = {key for key in back if not np.array_equal(bits(back[key]), bits(hf[key])) and not key.endswith(SUFFIX)}
    moe = "model.layers.0.block_sparse_moe.experts."
    want = {f"{moe}{e}.{w}.weight" for e in range(EXPERTS) for w in ("w1", "w3")} | {f"{moe}1.w2.weight"}
    assert {key for key in changed if ".layers.0." in key} == want
    a, b = (lora[PEFT + MLP + "lora_down_" + side][1] for side in "AB")
    total = exact_sum(np.asarray(native[MLP + "down_projs"].dequantize(F32))[1], a, b, 0.01).astype(F32).T
    codes, scales = helpers.quantize(total, CFG.block)
    key = moe + "1.w2.weight"
    np.testing.assert_allclose(np.asarray(back[key + SUFFIX]), scales, rtol=1e-6)
    got = helpers.dequantize(np.asarray(back[key]), np.asarray(back[key + SUFFIX]), F32, CFG.block)
    assert np.abs(got - total).max() <= np.abs(total).max() / 16
    assert back[key].dtype == FP8 and codes.shape == back[key].shape


def test_a_merged_fp8_weight_that_is_not_finite_is_named():
    native = mj.from_hf(random_hf(CFG), CFG, dtype=None)
    lora = {key: np.array(array) for key, array in group_lora(random_lora(), CFG).items()}
    lora[PEFT + MLP + "lora_down_B"][1, 0, 0] = np.inf
    with pytest.raises(NumericError) as error:
        merge_lora(native, lora, CFG, scaling=1.0)
    assert keys_of(error) == {MLP + "down_projs"}


@pytest.mark.parametrize("dtype", [jnp.bfloat16, None])
def test_more_experts_than_go_at_once_merge_as_a_trace_does(dtype):
    native = mj.from_hf(random_hf(MANY), MANY, dtype=dtype)
    whole = {key: np.round(array) for key, array in random_lora(cfg=MANY).items()}  # exact in any order of summation
    lora = group_lora(whole, MANY)
    merged = merge_lora(native, lora, MANY, scaling=0.5)
    jitted = jax.jit(lambda n, x: merge_lora(n, x, MANY, scaling=0.5))(native, lora)
    fp8 = dtype is None
    assert not differences(mj.to_hf(merged, MANY, quantization=fp8), mj.to_hf(jitted, MANY, quantization=fp8))


@pytest.mark.parametrize("prefix", ["", "model."])
def test_prefixes_of_adapter_and_tree_may_differ(prefix):
    native = mj.from_hf(random_hf(CFG), CFG)
    tree = native if prefix else helpers.without_prefix(native)
    want = merge_lora(native, group_lora(random_lora(), CFG), CFG, scaling=1.0)
    for adapter in ("", "model.", PEFT, PEFT + "model."):
        got = merge_lora(tree, group_lora(random_lora(prefix=adapter), CFG), CFG, scaling=1.0)
        assert not differences(got, want if prefix else helpers.without_prefix(want))


def test_lora_that_would_be_dropped_is_refused():
    native = mj.from_hf(random_hf(CFG), CFG)
    with pytest.raises(LayoutError, match="must be grouped first") as error:
        merge_lora(native, random_lora(), CFG, scaling=1.0)
    assert keys_of(error) == set(random_lora())
    lora = group_lora(random_lora(), CFG)
    some = {key: leaf for key, leaf in native.items() if ".layers.1." in key}
    with pytest.raises(LayoutError) as error:
        merge_lora(some, lora, CFG, scaling=1.0)
    assert keys_of(error) == {key for key in lora if ".layers.0." in key}


def test_factors_that_do_not_fit_their_weight_are_refused():
    native = mj.from_hf(random_hf(CFG), CFG)
    key = PEFT + MLP + "lora_down_A"
    for change in (lambda a: a[:, :-1], lambda a: a[:, :, :-1], lambda a: a[:-1], lambda a: a.astype(jnp.int32)):
        lora = group_lora(random_lora(), CFG)
        lora[key] = change(lora[key])
        with pytest.raises(LayoutError, match="wrong factor") as error:
            merge_lora(native, lora, CFG, scaling=1.0)
        assert keys_of(error) == {key}
    lora = group_lora(random_lora(), CFG)
    del lora[key]
    with pytest.raises(LayoutError, match="without its"):
        merge_lora(native, lora, CFG, scaling=1.0)


def test_every_lora_conversion_lowers_for_every_platform():
    native = jax.eval_shape(lambda: jax.tree.map(jnp.asarray, mj.from_hf(random_hf(CFG), CFG, dtype=None)))
    tree = random_lora()
    grouped = group_lora(tree, CFG)
    for function, *arguments in (
        (lambda x: group_lora(x, CFG), tree),
        (lambda x: group_lora(x, CFG, concatenate=True), tree),
        (lambda x: ungroup_lora(x, CFG), grouped),
        (lambda x: to_param_wrapper(x, CFG), grouped),
        (lambda x: from_param_wrapper(x, CFG), to_param_wrapper(grouped, CFG)),
        (lambda n, x: merge_lora(n, x, CFG, scaling=1.0), native, grouped),
    ):
        arguments = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), arguments)
        platforms = ["cpu", "cuda", "rocm", "tpu"]
        assert jax.export.export(jax.jit(function), platforms=platforms)(*arguments).platforms == tuple(platforms)
