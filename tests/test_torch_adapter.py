import copy
import pickle
import subprocess
import sys
import weakref
from types import SimpleNamespace

import helpers
import numpy as np
import pytest
import torch
from helpers import config
from nemo_oracle import (
    MoESplitExpertsStateDictMixin,
    StateDictAdapter,
    assert_same,
    bits,
    checkpoint,
    differences,
    nemo_adapter,
    nemo_module,
    our_adapter,
)
from test_torch_fp8 import random_matrix
from test_torch_mesh import rank_of

import minimax_jax.ops.fp8
import minimax_jax.ops.host
import torch_bridge.experts
from minimax_jax.errors import ConfigError, LayoutError, NumericError
from torch_bridge import NON_QUANTIZED_KEY_PATTERNS, MiniMaxM2StateDictAdapter, fp8, should_quantize_key
from torch_bridge.arrays import as_numpy, to_torch

LAYER = "model.layers.0."
MOE = LAYER + "block_sparse_moe."
GATE_UP, DOWN = LAYER + "mlp.experts.gate_and_up_projs", LAYER + "mlp.experts.down_projs"
SCALE = "_scale_inv"
UNKNOWN = {
    "model.visual.patch.weight": torch.ones(3),
    "model.layers.1.mlp.experts.something_new": torch.ones(2, 3),
    "model.layers.1.self_attn._extra_state": b"not a tensor",
    "lm_head.bias": torch.ones(3),
}
"""What the layout does not know."""


@pytest.fixture(scope="module")
def cfg():
    return config()


@pytest.fixture(scope="module")
def native(cfg):
    return nemo_adapter(cfg).from_hf(checkpoint(cfg))


# ---- from Hugging Face, beside NeMo


@pytest.mark.parametrize("scaled", ["F8_E4M3", "BF16", "F32"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("prefix", ["model.", "", "wrapped.model."])
def test_from_hf_equals_nemo(cfg, scaled, dtype, prefix):
    hf = {key.replace("model.", prefix, 1): tensor for key, tensor in checkpoint(cfg, scaled).items()}
    if prefix == "wrapped.model.":  # NeMo knows experts under no such prefix
        want = nemo_adapter(cfg, dtype).from_hf(checkpoint(cfg, scaled))
        want = {name.replace("model.", prefix, 1): tensor for name, tensor in want.items()}
    else:
        want = nemo_adapter(cfg, dtype).from_hf(dict(hf))
    assert differences(our_adapter(cfg, dtype).from_hf(hf), want) == []
    assert hf == {}


def test_float16_weights(cfg):
    got = our_adapter(cfg, torch.float16).from_hf(checkpoint(cfg))
    assert differences(got, nemo_adapter(cfg, torch.float16).from_hf(checkpoint(cfg))) == []


@pytest.mark.parametrize(
    "chosen",
    [
        lambda key: "layers.1." in key,
        lambda key: "experts." in key,
        lambda key: "self_attn" in key,
        lambda key: "gate.weight" in key or "bias" in key,
        lambda key: "layers" not in key,
        lambda key: False,
    ],
)
def test_partial_dicts_equal_nemo(cfg, chosen):
    hf = {key: tensor for key, tensor in checkpoint(cfg).items() if chosen(key)}
    want = nemo_adapter(cfg).from_hf(dict(hf))
    assert differences(our_adapter(cfg).from_hf(hf), want) == []


def test_nan_stays_nan(cfg):
    hf = checkpoint(cfg)
    hf[W1].view(torch.uint8)[3, 5] = 0x7F
    hf[Q].view(torch.uint8)[3, 5] = 0xFF
    got, want = our_adapter(cfg).from_hf(dict(hf)), nemo_adapter(cfg).from_hf(dict(hf))
    for name in (GATE_UP, Q):
        assert torch.equal(got[name].isnan(), want[name].isnan()) and got[name].isnan().sum() == 1
        assert torch.equal(got[name].nan_to_num(), want[name].nan_to_num())


def test_unknown_keys_pass_as_they_are(cfg):
    got = our_adapter(cfg).from_hf(checkpoint(cfg) | UNKNOWN)
    want = nemo_adapter(cfg).from_hf(checkpoint(cfg) | UNKNOWN)
    assert got.keys() == want.keys()
    assert all(got[key] is value and want[key] is value for key, value in UNKNOWN.items())
    assert all(our_adapter(cfg).to_hf(dict(UNKNOWN))[key] is value for key, value in UNKNOWN.items())


def test_unknown_fp8_weights_are_dequantised_as_in_nemo(cfg):
    known = checkpoint(cfg)
    key = "model.mtp.0.proj.weight"
    extra = {
        key: known[LAYER + "self_attn.q_proj.weight"],
        key + SCALE: known[LAYER + "self_attn.q_proj.weight" + SCALE],
    }
    assert differences(our_adapter(cfg).from_hf(dict(extra)), nemo_adapter(cfg).from_hf(dict(extra))) == []


def test_tensors_that_need_no_conversion_are_the_callers_own(cfg):
    hf = checkpoint(cfg, "BF16")
    got = our_adapter(cfg).from_hf(dict(hf))
    assert got[LAYER + "self_attn.q_proj.weight"] is hf[LAYER + "self_attn.q_proj.weight"]
    assert got[LAYER + "mlp.gate.weight"] is hf[MOE + "gate.weight"]
    assert got["model.norm.weight"] is hf["model.norm.weight"]


@pytest.mark.parametrize("kernels", ["numba", "xla"])
@pytest.mark.parametrize("scaled", ["F8_E4M3", "BF16", "F32"])
def test_all_ways_on_cpu_give_the_same_bits(cfg, monkeypatch, kernels, scaled):
    monkeypatch.setenv("MINIMAX_JAX_CPU", kernels)
    want = nemo_adapter(cfg).from_hf(checkpoint(cfg, scaled))
    assert differences(our_adapter(cfg).from_hf(checkpoint(cfg, scaled)), want) == []
    assert differences(our_adapter(cfg).to_hf(want), nemo_adapter(cfg).to_hf(dict(want))) == []


@pytest.mark.parametrize("scaled", ["F8_E4M3", "F32"])
def test_matrices_of_several_bands_give_the_same_bits(cfg, native, monkeypatch, scaled):
    monkeypatch.setenv("MINIMAX_JAX_CPU", "xla")
    monkeypatch.setattr(torch_bridge.experts, "_BAND", 1)  # of one block then: 320 columns are three, one in part
    bands, cut = [], torch_bridge.experts._band
    monkeypatch.setattr(torch_bridge.experts, "_band", lambda *args: bands.append(args[1]) or cut(*args))
    want = nemo_adapter(cfg).from_hf(checkpoint(cfg, scaled))
    assert differences(our_adapter(cfg).from_hf(checkpoint(cfg, scaled)), want) == []
    assert set(bands) == {0, 128, 256}


@pytest.mark.parametrize("offset", [(0, 0), (128, 128), (30, 100), (5, 250)])
def test_bands_of_a_slice_that_begins_anywhere(monkeypatch, offset):
    monkeypatch.setenv("MINIMAX_JAX_CPU", "xla")
    monkeypatch.setattr(torch_bridge.experts, "_BAND", 1)
    codes, scales = (to_torch(array) for array in random_matrix(np.random.default_rng(0), (300, 700), fp8.BLOCK))
    want = fp8.dequantize_torch(codes, scales, torch.bfloat16)[offset[0] :, offset[1] :]
    part = torch_bridge.experts.Part(codes[offset[0] :, offset[1] :], scales, offset)
    out = torch.empty(1, *want.T.shape, dtype=torch.bfloat16)
    torch_bridge.experts.fill(out, [torch_bridge.experts.Filling(out[0], (part,))], fp8.BLOCK)
    assert_same(out[0].T, want)


@pytest.mark.parametrize("scale", [2e-38, 1e38, float("inf"), 0.0, -1.0])
def test_scales_that_are_not_ordinary(cfg, monkeypatch, scale):
    monkeypatch.setenv("MINIMAX_JAX_CPU", "numba")
    hf = checkpoint(cfg)
    hf[W1 + SCALE][1, 1] = scale
    got, want = our_adapter(cfg).from_hf(dict(hf))[GATE_UP], nemo_adapter(cfg).from_hf(dict(hf))[GATE_UP]
    flushed = (want != 0) & (want.abs() <= torch.finfo(torch.float32).tiny)  # XLA has no denormals
    assert flushed.any() == (scale == 2e-38)
    assert torch.equal(got[~flushed].nan_to_num(), want[~flushed].nan_to_num())
    assert torch.equal(got.isnan(), want.isnan()) and got.isnan().any() == (scale == float("inf"))
    assert ((got == want) | (got == 0))[flushed].all()


@pytest.fixture
def as_on_another_device(monkeypatch):
    """CPU tensors take the way of those of other devices: torch alone, JAX is out of reach."""
    monkeypatch.setattr(fp8, "on_cpu", lambda *_: False)
    for module, names in (
        (minimax_jax.ops.fp8, ("dequantize", "quantize")),
        (minimax_jax.ops.host, ("kernels_for",)),
        (torch_bridge.experts, ("_turned", "_row_major", "as_numpy")),
        (fp8, ("to_jax", "to_torch")),
    ):
        for name in names:
            monkeypatch.setattr(module, name, None)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16])
@pytest.mark.parametrize("scaled", ["F8_E4M3", "BF16", "F32"])
def test_other_devices_stay_in_torch_with_the_same_bits(cfg, request, scaled, dtype):
    jitted = our_adapter(cfg, dtype).from_hf(checkpoint(cfg, scaled))
    codes = {name: our_adapter(cfg).to_hf(jitted, quantization=name) for name in (False, True)}
    request.getfixturevalue("as_on_another_device")
    native = our_adapter(cfg, dtype).from_hf(checkpoint(cfg, scaled))
    assert differences(native, jitted) == []
    assert differences(native, nemo_adapter(cfg, dtype).from_hf(checkpoint(cfg, scaled))) == []
    for quantization, hf in codes.items():
        assert differences(our_adapter(cfg).to_hf(native, quantization=quantization), hf) == []


@pytest.mark.parametrize("hidden", [512, 320])  # a half is whole blocks, or is not
def test_other_devices_convert_the_experts_of_a_rank_with_the_same_bits(request, hidden):
    cfg = config(hidden_size=hidden, intermediate_size=256, num_hidden_layers=1, num_local_experts=2)
    want = our_adapter(cfg).from_hf(checkpoint(cfg))
    request.getfixturevalue("as_on_another_device")
    for rank in range(4):
        with rank_of(rank, ep_shard=2, ep=2) as mesh:
            native = our_adapter(cfg).from_hf(checkpoint(cfg), mesh)
            for name in (GATE_UP, DOWN):
                assert_same(native[name].to_local(), want[name].chunk(2, 1)[rank // 2].chunk(2, 0)[rank % 2])


@pytest.mark.parametrize("wrap", [lambda t: t.T.contiguous().T, lambda t: torch.nn.Parameter(t, False), slice])
def test_inputs_of_any_strides_and_addresses(cfg, native, wrap):
    def odd(tensor):
        if wrap is not slice:
            return wrap(tensor)
        memory = torch.empty(tensor.numel() + 1, dtype=tensor.dtype)  # as tensors lie in a file: at any address
        return memory[1:].view(tensor.shape).copy_(tensor)

    hf = {key: odd(tensor) if tensor.ndim == 2 else tensor for key, tensor in checkpoint(cfg).items()}
    got = our_adapter(cfg).from_hf(hf)
    assert all(torch.equal(tensor, native[name]) for name, tensor in got.items())


def test_sizes_are_taken_from_what_is_there(native, cfg):
    moe = SimpleNamespace(n_routed_experts=cfg.num_local_experts, moe_inter_dim=cfg.intermediate_size)
    for config_, moe_ in (
        (SimpleNamespace(), moe),
        (SimpleNamespace(hidden_size=cfg.hidden_size, num_hidden_layers=cfg.num_hidden_layers), moe),
        (SimpleNamespace(quantization_config={"weight_block_size": [128, 128]}), moe),
        (cfg, SimpleNamespace(**vars(moe), dim=cfg.hidden_size)),
    ):
        adapter = MiniMaxM2StateDictAdapter(config_, moe_, None, dtype=torch.bfloat16)
        assert differences(adapter.from_hf(checkpoint(cfg)), native) == []
        assert differences(adapter.to_hf(native), nemo_adapter(cfg).to_hf(dict(native))) == []


def test_another_block_size(cfg):
    cfg = cfg.replace(weight_block_size=(64, 32))
    moe = SimpleNamespace(n_routed_experts=cfg.num_local_experts, moe_inter_dim=cfg.intermediate_size)
    source = SimpleNamespace(quantization_config={"weight_block_size": [64, 32]})
    adapter = MiniMaxM2StateDictAdapter(source, moe, None, dtype=torch.float32)
    want = helpers.native_of(helpers.random_hf(cfg), cfg, np.float32)
    got = {name: as_numpy(tensor) for name, tensor in adapter.from_hf(checkpoint(cfg)).items()}
    assert helpers.differences(got, want) == []
    codes = adapter.to_hf(adapter.from_hf(checkpoint(cfg)), quantization=True)
    assert codes[MOE + "experts.0.w1.weight" + SCALE].shape == (3, 10)


# ---- in place


def test_the_pure_form_leaves_its_input_alone(cfg, native):
    hf = checkpoint(cfg)
    before = dict(hf)
    copies = {key: tensor.clone() for key, tensor in hf.items()}
    assert differences(our_adapter(cfg).convert_from_hf(hf), native) == []
    assert hf.keys() == before.keys() and all(hf[key] is before[key] for key in hf)
    assert differences(hf, copies) == []


def test_matrices_are_let_go_of_one_by_one(monkeypatch):
    cfg = config(hidden_size=64, intermediate_size=32, num_hidden_layers=1, num_local_experts=32)
    hf = checkpoint(cfg)
    alive = [weakref.ref(tensor) for key, tensor in hf.items() if ".experts." in key]
    counts, fill = [], torch_bridge.experts._fill

    def counted(filling, block):
        nbytes = fill(filling, block)
        del filling
        counts.append(sum(reference() is not None for reference in alive))
        return nbytes

    monkeypatch.setattr(torch_bridge.experts, "_fill", counted)
    our_adapter(cfg).from_hf(hf)
    experts, at_work = cfg.num_local_experts, torch_bridge.experts._WORKERS
    assert len(alive) == 6 * experts and len(counts) == 2 * experts  # gate and up of each, then down
    left = [4 * max(experts - done, 0) + 2 * min(2 * experts - done, experts) for done in range(1, 2 * experts + 1)]
    assert all(count <= bound + 4 * at_work for count, bound in zip(counts, left, strict=True))
    assert not any(reference() for reference in alive)


def damaged(cfg, change):
    hf = checkpoint(cfg)
    change(hf)
    return hf


W1 = MOE + "experts.1.w1.weight"
HALFWAY = LAYER + "mlp.experts.1.gate_proj.weight"
Q = LAYER + "self_attn.q_proj.weight"


def rename(old, new):
    return lambda hf: hf.update({new: hf.pop(old), new + SCALE: hf.pop(old + SCALE)})


@pytest.mark.parametrize(
    ("change", "key", "message"),
    [
        (lambda hf: hf.pop(W1 + SCALE), W1, "without its scales"),
        (lambda hf: hf.pop(W1), W1, "missing tensor"),
        (lambda hf: (hf.pop(W1), hf.pop(W1 + SCALE)), W1, "missing tensor"),
        (lambda hf: hf.pop(Q + SCALE), Q, "without its scales"),
        (lambda hf: hf.pop(Q), Q + SCALE, "scales without"),
        (lambda hf: hf.update({"a.weight" + SCALE: torch.ones(1, 1)}), "a.weight" + SCALE, "scales without"),
        (lambda hf: hf.update({"a.weight": hf[Q]}), "a.weight", "without its scales"),
        (lambda hf: hf.update({Q: hf[Q].float()}), Q + SCALE, "scales without"),
        (lambda hf: hf.update({Q: hf[Q][None]}), Q, "not a matrix"),
        (lambda hf: hf.update({Q + SCALE: torch.ones(1, 1)}), Q + SCALE, "wrong grid"),
        (lambda hf: hf.update({Q + SCALE: hf[Q + SCALE].double()}), Q + SCALE, "wrong dtype"),
        (lambda hf: hf.update({W1: hf[W1].T}), W1, "transposed"),
        (lambda hf: hf.update({W1: hf[W1].bfloat16()}), W1, "differ in dtype"),
        (lambda hf: hf.update({W1: "a word"}), W1, "missing tensor"),
        (rename(W1, MOE + "experts.1.w4.weight"), MOE + "experts.1.w4.weight", "not the name"),
        (rename(W1, MOE + "experts.3.w1.weight"), MOE + "experts.3.w1.weight", "not the name"),
        (
            rename(W1, LAYER + "mlp.experts.1.gate_proj.weight"),
            LAYER + "mlp.experts.1.gate_proj.weight",
            "not the name",
        ),
        (lambda hf: [hf.pop(key) for key in list(hf) if MOE in key and ".w2." in key], DOWN, "missing experts"),
        (lambda hf: hf.update({LAYER + "mlp.gate.weight": torch.ones(1)}), LAYER + "mlp.gate.weight", "two tensors"),
    ],
)
def test_what_is_wrong_is_named_before_anything_is_taken(cfg, change, key, message):
    hf = damaged(cfg, change)
    before = dict(hf)
    with pytest.raises(LayoutError, match=message) as caught:
        our_adapter(cfg).from_hf(hf)
    assert key in [problem.key for problem in caught.value.problems]
    assert hf.keys() == before.keys() and all(hf[name] is before[name] for name in hf)


def test_everything_wrong_is_told_at_once(cfg):
    hf = checkpoint(cfg)
    for key in (W1, Q, MOE.replace("0", "1") + "experts.0.w2.weight" + SCALE):
        del hf[key]
    with pytest.raises(LayoutError) as caught:
        our_adapter(cfg).from_hf(hf)
    assert len({problem.key.split(".weight")[0] for problem in caught.value.problems}) == 3


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


# ---- destinations of a loader


def test_fp8_destinations_are_nemos(cfg, native):
    got = our_adapter(cfg).load_destinations(native, quantization=True)
    want = nemo_adapter(cfg).to_hf(dict(native), quantization=True, for_checkpoint_load=True)
    assert list(got) == list(want)
    for key, tensor in got.items():
        assert (tensor.dtype, tensor.shape) == (want[key].dtype, want[key].shape)
        if key.endswith(SCALE):
            assert (tensor == 1).all()
    for key, tensor in checkpoint(cfg).items():
        got[key].copy_(tensor)
    assert differences(our_adapter(cfg).from_hf(got), native) == []


def test_nemos_loader_gets_destinations(cfg, native):
    adapter = our_adapter(cfg)
    for quantization in (False, True):
        got = adapter.to_hf(native, quantization=quantization, for_checkpoint_load=True, device_mesh=None)
        assert list(got) == list(adapter.load_destinations(native, quantization=quantization))


def test_destinations_are_the_models_own_storage(cfg, native):
    model = {name: torch.zeros_like(tensor) for name, tensor in native.items()}
    destinations = our_adapter(cfg).load_destinations(model)
    for key, tensor in our_adapter(cfg).to_hf(native).items():
        destinations[key].copy_(tensor)
    assert differences(model, native) == []
    got = our_adapter(cfg).from_hf(destinations)
    assert got.keys() == model.keys() and all(got[name] is model[name] for name in model)
    assert destinations == {}


def test_a_destination_that_went_missing_is_an_error(cfg, native):
    destinations = our_adapter(cfg).load_destinations(native)
    del destinations[W1]
    with pytest.raises(LayoutError, match="missing tensor"):
        our_adapter(cfg).from_hf(destinations)


def test_destinations_that_were_replaced_are_converted(cfg, native):
    destinations = our_adapter(cfg).load_destinations({name: torch.zeros_like(t) for name, t in native.items()})
    destinations |= our_adapter(cfg).to_hf(native)
    assert differences(our_adapter(cfg).from_hf(destinations), native) == []


def test_the_meta_device_gives_names_and_shapes(cfg, native):
    meta = {name: tensor.to("meta") for name, tensor in native.items()}
    for quantization in (False, True):
        got = our_adapter(cfg).to_hf(meta, quantization=quantization)
        want = our_adapter(cfg).to_hf(native, quantization=quantization)
        assert {k: (t.shape, t.dtype) for k, t in got.items()} == {k: (t.shape, t.dtype) for k, t in want.items()}
        back = our_adapter(cfg).from_hf(got)
        assert {k: (t.shape, t.dtype) for k, t in back.items()} == {k: (t.shape, t.dtype) for k, t in native.items()}


# ---- the object


def test_instances_are_what_nemos_callers_ask_for(cfg):
    adapter = our_adapter(cfg)
    assert isinstance(adapter, StateDictAdapter)
    assert isinstance(adapter, MoESplitExpertsStateDictMixin)
    assert isinstance(adapter, MiniMaxM2StateDictAdapter)
    nemo = nemo_adapter(cfg)
    for name in dir(nemo):
        assert hasattr(adapter, name) or name in ("_last_expert_ids", "_inplace_loaded_native_keys")
    for name in (
        *("view_loaded_native_keys", "supports_low_memory_dcp_load", "_expert_path_segment", "_is_gated_moe"),
        *("checkpoint_key_aliases", "_hf_prefix", "_uses_model_prefix", "_v5_peft_target_parameters"),
    ):
        assert getattr(adapter, name) == getattr(nemo, name), name
    assert adapter.supports_write_through_checkpoint_load is False
    assert adapter.map_peft_target_module_to_hf("a.b") == "a.b"
    assert adapter.iter_checkpoint_load_parts({}) is None


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, lambda adapter: pickle.loads(pickle.dumps(adapter))])
def test_instances_can_be_copied(cfg, native, duplicate):
    adapter = duplicate(our_adapter(cfg))
    assert isinstance(adapter, StateDictAdapter)
    assert differences(adapter.from_hf(checkpoint(cfg)), native) == []


def test_a_subclass_is_its_own_class(cfg):
    class Mine(MiniMaxM2StateDictAdapter):
        def _native_key_to_hf(self, key):
            return "mine"

    nemo = nemo_adapter(cfg)
    adapter = copy.copy(Mine(nemo.config, nemo.moe_config, nemo.backend))
    assert isinstance(adapter, Mine) and isinstance(adapter, StateDictAdapter)
    assert adapter._native_key_to_hf("a") == "mine"


@pytest.mark.parametrize(
    ("moe", "dtype", "key"),
    [
        ({"expert_bias": True}, torch.bfloat16, "expert_bias"),
        ({"expert_activation": "relu2"}, torch.bfloat16, "expert_activation"),
        ({}, torch.float64, None),
    ],
)
def test_what_minimax_does_not_have_is_refused(cfg, moe, dtype, key):
    nemo = nemo_adapter(cfg)
    moe_config = SimpleNamespace(**vars(nemo.moe_config) | moe)
    with pytest.raises(ConfigError) as caught:
        MiniMaxM2StateDictAdapter(nemo.config, moe_config, nemo.backend, dtype=dtype)
    assert caught.value.problems[0].key == key


def test_nemo_is_not_imported_nor_needed():
    script = """
import sys, torch, torch_bridge
from types import SimpleNamespace
moe = SimpleNamespace(n_routed_experts=2, moe_inter_dim=3)
adapter = torch_bridge.MiniMaxM2StateDictAdapter(SimpleNamespace(), moe, None)
experts = "layers.0.mlp.experts."
native = {experts + "gate_and_up_projs": torch.ones(2, 4, 6), experts + "down_projs": torch.ones(2, 3, 4)}
assert adapter.from_hf(adapter.to_hf(native)).keys() == native.keys()
assert type(adapter) is torch_bridge.MiniMaxM2StateDictAdapter
assert not any(name.startswith("nemo") or name.startswith("transformers") for name in sys.modules)
"""
    subprocess.run([sys.executable, "-c", script], check=True)
