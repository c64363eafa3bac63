"""LoRA of torch tensors merged into weights, and run by PEFT."""

import json
import warnings

import pytest
import torch
from lora_cases import CFG, HUB, LAYERS, PEFT, RANK, keys_of, tiny_model
from nemo_oracle import checkpoint, differences, nemo_adapter, our_adapter
from safetensors.torch import load_file, save_file
from torch_lora_cases import factors

from minimax_jax.errors import LayoutError
from torch_bridge.lora import merge_lora

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import peft


@pytest.fixture(scope="module")
def grouped():
    return nemo_adapter(CFG).from_hf(factors())


# ---- merging


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_merged_weights_equal_torchs_own_sum(grouped, device):
    cfg = CFG
    native = our_adapter(cfg, torch.bfloat16).from_hf(checkpoint(cfg, "BF16")) | {"model.extra": b"not a tensor"}
    kept = {name: value.clone() if isinstance(value, torch.Tensor) else value for name, value in native.items()}
    merged = merge_lora(
        {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in native.items()},
        {name: tensor.to(device) for name, tensor in grouped.items()},
        cfg,
        scaling=0.5,
    )
    assert list(merged) == list(native)
    for name, tensor in merged.items():
        if not name.endswith("_projs"):
            assert tensor is native[name] or device == "meta"
            continue
        assert (tensor.shape, tensor.dtype, tensor.device.type) == (native[name].shape, torch.bfloat16, device)
        if device == "cpu":
            lora = PEFT + name.replace("gate_and_up_projs", "lora_gate_and_up_").replace("down_projs", "lora_down_")
            want = native[name].double() + 0.5 * (grouped[lora + "A"].double() @ grouped[lora + "B"].double())
            assert ((tensor.double() - want).abs() <= 1.001 * 2**-8 * want.abs() + 1e-6).all()
            assert torch.equal(native[name], kept[name]) and not torch.equal(tensor, kept[name])


def test_lora_of_nothing_is_named(grouped):
    with pytest.raises(LayoutError, match="LoRA of nothing") as error:
        merge_lora({}, grouped, CFG, scaling=1.0)
    assert keys_of(error) == grouped.keys()


# ---- beside PEFT


def logits(model):
    with torch.no_grad():
        return model(torch.arange(20).reshape(2, 10)).logits


def load_peft(folder):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.PeftModel.from_pretrained(tiny_model(), folder)


def write_adapter(folder, tensors, **options):
    folder.mkdir()
    (folder / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "task_type": "CAUSAL_LM", "lora_alpha": 5, "r": RANK} | options)
    )
    save_file(tensors, folder / "adapter_model.safetensors")


def test_pefts_own_adapter_goes_through_us_unchanged(tmp_path):
    parameters = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    config = peft.LoraConfig(
        r=RANK, lora_alpha=5, target_parameters=parameters, target_modules=["q_proj"], init_lora_weights=False
    )
    torch.manual_seed(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(tiny_model(), config).eval()
        model.save_pretrained(tmp_path / "theirs")
    stored = load_file(tmp_path / "theirs/adapter_model.safetensors")
    native = our_adapter(CFG).convert_from_hf(stored)
    assert len([name for name in native if "lora_gate_and_up" in name or "lora_down" in name]) == 4 * LAYERS
    ours = our_adapter(CFG).to_hf(native)
    assert differences(ours, stored) == []
    raw = json.loads((tmp_path / "theirs/adapter_config.json").read_text())
    write_adapter(tmp_path / "ours", ours, **raw)
    assert torch.equal(logits(load_peft(tmp_path / "ours")), logits(model))
    assert not torch.equal(logits(model), logits(tiny_model()))


def test_a_published_adapter_with_two_as_runs_in_peft_as_it_was(tmp_path):
    tree = factors(HUB, shared=False)
    write_adapter(tmp_path / "published", tree, target_modules=["w1", "w2", "w3"])
    want = logits(load_peft(tmp_path / "published"))
    hf = our_adapter(CFG).to_hf(our_adapter(CFG).convert_from_hf(tree, concatenate_lora=True))
    parameters = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    twice = {"r": 2 * RANK, "lora_alpha": 10, "target_modules": [], "target_parameters": parameters}
    write_adapter(tmp_path / "ours", hf, **twice)
    torch.testing.assert_close(logits(load_peft(tmp_path / "ours")), want, rtol=0, atol=1e-5 * float(want.abs().max()))
    assert not torch.allclose(want, logits(tiny_model()), atol=1e-2)
