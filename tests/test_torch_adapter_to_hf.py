"""Native tensors to Hugging Face ones, beside NeMo's own adapter; and what is real in FP8 here."""

from types import SimpleNamespace

import helpers
import numpy as np
import pytest
import torch
from adapter_cases import DOWN, GATE_UP, LAYER, MOE, SCALE, UNKNOWN, W1
from helpers import config
from nemo_oracle import bits, checkpoint, differences, nemo_adapter, nemo_module, our_adapter

from minimax_jax.errors import LayoutError, NumericError
from torch_bridge import NON_QUANTIZED_KEY_PATTERNS, MiniMaxM2StateDictAdapter, should_quantize_key
from torch_bridge.arrays import as_numpy

# ---- to Hugging Face, beside NeMo


def test_to_hf_equals_nemo(cfg, native):
    got, want = our_adapter(cfg).to_hf(native), nemo_adapter(cfg).to_hf(dict(native))
    assert differences(got, want) == []
    assert list(got) == list(want)
    assert all(tensor.is_contiguous() for tensor in got.values())


def test_to_hf_undoes_from_hf(cfg):
    for scaled in ("BF16", "F32"):
        hf = checkpoint(cfg, scaled)
        adapter = our_adapter(cfg, torch.bfloat16 if scaled == "BF16" else torch.float32)
        assert differences(adapter.to_hf(adapter.convert_from_hf(hf)), hf) == []


def test_experts_are_copies(cfg, native):
    kept = {name: tensor.clone() for name, tensor in native.items()}
    hf = our_adapter(cfg).to_hf(native)
    for key, tensor in hf.items():
        if ".experts." in key:
            tensor.fill_(3)
    assert differences(native, kept) == []


@pytest.mark.parametrize("shape", [(3, 1, 8), (3, 4, 2), (1, 1, 2)])
def test_experts_with_an_axis_of_one_are_copies_too(shape):
    experts, hidden, twice = shape
    moe = SimpleNamespace(n_routed_experts=experts, moe_inter_dim=twice // 2)
    adapter = MiniMaxM2StateDictAdapter(SimpleNamespace(hidden_size=hidden), moe, None)
    tensor = torch.randn(shape)
    kept = tensor.clone()
    for value in adapter.to_hf({GATE_UP: tensor}).values():
        value.fill_(3)
    assert torch.equal(tensor, kept)


@pytest.mark.parametrize("prefix", ["model.", "", "base_model.model."])
def test_names_keep_their_prefix(cfg, native, prefix):
    adapter = our_adapter(cfg)
    got = adapter.to_hf({name.replace("model.", prefix, 1): tensor for name, tensor in native.items()})
    want = {key.replace("model.", prefix, 1) for key in adapter.to_hf(native)}
    assert got.keys() == want


def test_nothing_is_remembered_from_call_to_call(cfg, native):
    adapter = our_adapter(cfg)
    state = dict(vars(adapter))
    adapter.from_hf({key.removeprefix("model."): tensor for key, tensor in checkpoint(cfg).items()})
    adapter.to_hf(native, for_checkpoint_load=True)
    assert vars(adapter) == state
    assert list(adapter.to_hf(native)) == list(our_adapter(cfg).to_hf(native))
    assert adapter.view_loaded_native_keys == set()


@pytest.mark.parametrize("pattern", [r".*w2.*", r"model\.layers\.0\.", r"weight", r"lm_head.*|.*norm.*", ""])
@pytest.mark.parametrize("quantization", [False, True])
def test_exclusion_equals_nemo(cfg, native, pattern, quantization):
    got = our_adapter(cfg).to_hf(native, exclude_key_regex=pattern, quantization=quantization)
    want = nemo_adapter(cfg).to_hf(dict(native), exclude_key_regex=pattern, quantization=quantization)
    assert list(got) == list(want)


def test_single_tensors_equal_nemo(cfg, native):
    nemo, ours = nemo_adapter(cfg), our_adapter(cfg)
    for name, tensor in (native | UNKNOWN).items():
        want = nemo.convert_single_tensor_to_hf(name, tensor)
        got = ours.convert_single_tensor_to_hf(name, tensor)
        assert [key for key, _ in got] == [key for key, _ in want]
        if isinstance(tensor, torch.Tensor):
            assert all(torch.equal(bits(a), bits(b)) for (_, a), (_, b) in zip(got, want, strict=True))
    assert ours.convert_single_tensor_to_hf(DOWN, native[DOWN], exclude_key_regex=".*") == []


def test_names_equal_nemo(cfg, native):
    nemo, ours = nemo_adapter(cfg), our_adapter(cfg)
    state = native | UNKNOWN
    assert ours.get_hf_state_dict_keys(state) == nemo.get_hf_state_dict_keys(state)
    halfway = {nemo._hf_key_to_native(key) for key in checkpoint(cfg)}
    for key in {*checkpoint(cfg), *state, *halfway, "model.layers.0", "layers", "", W1 + ".more"}:
        assert ours._hf_key_to_native(key) == nemo._hf_key_to_native(key)
        assert ours._native_key_to_hf(key) == nemo._native_key_to_hf(key)
    assert len(halfway & set(state)) < len(halfway)


def test_dequantize_equals_nemo(cfg):
    hf = checkpoint(cfg)
    got = our_adapter(cfg)._dequantize(hf)
    assert got is hf
    assert differences(got, nemo_adapter(cfg)._dequantize(checkpoint(cfg))) == []
    del hf[W1]
    hf[W1] = checkpoint(cfg)[W1]
    with pytest.raises(LayoutError, match="without its scales"):
        our_adapter(cfg)._dequantize(hf)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda native: native.update({DOWN: native[DOWN][:2]}), "wrong shape"),
        (lambda native: native.update({DOWN: native[DOWN].mT}), "transposed"),
        (lambda native: native.update({GATE_UP: native[GATE_UP].to(torch.float8_e4m3fn)}), "without its scales"),
        (lambda native: native.update({GATE_UP: native[GATE_UP].double()}), "wrong dtype"),
        (lambda native: native.update({GATE_UP: None}), "missing tensor"),
    ],
)
def test_wrong_experts_are_named(cfg, native, change, message):
    native = dict(native)
    change(native)
    with pytest.raises(LayoutError, match=message):
        our_adapter(cfg).to_hf(native)


# ---- FP8


def test_quantization_has_real_scales(cfg, native):
    hf = our_adapter(cfg).to_hf(native, quantization=True)
    plain = our_adapter(cfg).to_hf(native)
    assert hf.keys() == checkpoint(cfg).keys()
    for key, tensor in plain.items():
        if key + SCALE not in hf:
            assert hf[key] is tensor or torch.equal(hf[key], tensor)
            continue
        codes, scales = helpers.quantize(as_numpy(tensor))
        np.testing.assert_array_equal(helpers.bits(as_numpy(hf[key])), helpers.bits(codes))
        np.testing.assert_array_equal(as_numpy(hf[key + SCALE]), scales)


def test_fp8_comes_back_closer_than_nemos_scales_of_one(cfg, native):
    native = native | {name: torch.randn(native[name].shape).bfloat16() * 0.002 for name in (GATE_UP, DOWN)}
    errors = []
    for adapter in (our_adapter(cfg), nemo_adapter(cfg)):
        back = our_adapter(cfg).from_hf(adapter.to_hf(dict(native), quantization=True))
        errors.append(float((back[DOWN].float() - native[DOWN].float()).norm() / native[DOWN].float().norm()))
    assert errors[0] < 0.04  # e4m3 keeps 3 bits: about 2.6 % of normal weights
    assert errors[1] > 0.2


def test_keys_that_are_quantised_are_nemos():
    nemo = nemo_module("state_dict_adapter")
    assert list(NON_QUANTIZED_KEY_PATTERNS) == nemo.NON_QUANTIZED_KEY_PATTERNS
    for key in (*checkpoint(config()), *UNKNOWN, "a.weight", "a.lora_A.weight"):
        assert should_quantize_key(key) == nemo.should_quantize_key(key)


def test_unknown_weights_are_not_quantised(cfg):
    extra = {"model.mtp.proj.weight": torch.randn(4, 4), LAYER + "mlp.experts.lora_A.weight": torch.randn(4, 4)}
    hf = our_adapter(cfg).to_hf(extra, quantization=True)
    assert hf.keys() == extra.keys() and all(hf[key] is extra[key] for key in extra)


def test_a_nan_is_named(cfg, native):
    native = native | {DOWN: native[DOWN].clone()}
    native[DOWN][1, 2, 3] = float("nan")
    with pytest.raises(NumericError, match="NaN") as caught:
        our_adapter(cfg).to_hf(native, quantization=True)
    assert caught.value.problems[0].key == MOE + "experts.1.w2.weight"
