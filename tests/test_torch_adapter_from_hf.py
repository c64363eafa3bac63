"""Hugging Face tensors to native ones, beside NeMo's own adapter."""

from types import SimpleNamespace

import helpers
import numpy as np
import pytest
import torch
from adapter_cases import DOWN, GATE_UP, LAYER, MOE, SCALE, UNKNOWN, W1, Q
from fp8_cases import random_matrix
from helpers import config
from nemo_oracle import assert_same, checkpoint, differences, nemo_adapter, our_adapter
from rank_tensors import rank_of

import minimax_jax.ops.fp8
import minimax_jax.ops.host
import torch_bridge.experts
from torch_bridge import MiniMaxM2StateDictAdapter, fp8
from torch_bridge.arrays import as_numpy, to_torch


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
