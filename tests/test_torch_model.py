"""NeMo's own MiniMax-M2 model with its adapter swapped for ours, beside transformers' model on the same FP8 folder."""

import warnings

import folders
import pytest
import torch
import torch.distributed.checkpoint as dcp
import transformers
from helpers import config, random_hf
from nemo_oracle import BackendConfig, MiniMaxM2StateDictAdapter, checkpoint, differences, nemo_module

SIZES = {
    "hidden_size": 256,
    "intermediate_size": 128,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
}


@pytest.fixture(scope="module")
def cfg():
    return config(**SIZES)


def build(cfg, adapter):
    """NeMo's model on CPU, which makes its own adapter by the name `adapter` stands under."""
    raw = cfg.to_dict()
    known = {name: raw[name] for name in (*SIZES, "num_hidden_layers", "head_dim", "rope_parameters", "rms_norm_eps")}
    settings = transformers.MiniMaxM2Config(**known, bos_token_id=1, eos_token_id=2, dtype="float32")
    settings.torch_dtype, settings.use_qk_norm = torch.float32, True  # NeMo's names
    backend = BackendConfig(
        linear="torch",
        attn="sdpa",
        rms_norm="torch",
        rope_fusion=False,
        dispatcher="torch",
        experts="torch",
        fake_balanced_gate=False,
        enable_hf_state_dict_adapter=True,
    )
    module = nemo_module("model")
    with pytest.MonkeyPatch.context() as patch:
        if adapter is not None:
            patch.setattr(module, "MiniMaxM2StateDictAdapter", adapter)
        return module.MiniMaxM2ForCausalLM(settings, backend=backend).eval()


def load(model, hf):
    missing, unexpected = model.load_state_dict(model.state_dict_adapter.from_hf(dict(hf)), strict=True)
    assert not missing and not unexpected
    return model


def logits(model):
    with torch.no_grad():
        return model(torch.arange(40).reshape(2, 20)).logits


def test_nemos_model_with_our_adapter(cfg):
    hf = checkpoint(cfg)
    ours, nemos = load(build(cfg, MiniMaxM2StateDictAdapter), hf), load(build(cfg, None), hf)
    assert type(ours.state_dict_adapter) is not type(nemos.state_dict_adapter)
    assert isinstance(ours.state_dict_adapter, MiniMaxM2StateDictAdapter)
    assert differences(ours.state_dict(), nemos.state_dict()) == []
    assert torch.equal(logits(ours), logits(nemos))


def test_nemos_model_agrees_with_transformers(cfg, tmp_path):
    folders.write(tmp_path / "fp8", random_hf(cfg), cfg)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "fp8", dtype=torch.float32).eval()
    want = logits(theirs)
    got = logits(load(build(cfg, MiniMaxM2StateDictAdapter), checkpoint(cfg)))
    # float32 throughout: the sums are made in another order, 3e-5 of logits up to 50 was seen.
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5 * float(want.abs().max()))


@pytest.mark.parametrize("scaled", ["F8_E4M3", "F32"])
def test_torchs_loader_fills_the_destinations(cfg, tmp_path, scaled):
    folders.write(tmp_path / "hf", random_hf(cfg, scaled), cfg)
    model = build(cfg, MiniMaxM2StateDictAdapter)
    adapter, parameters = model.state_dict_adapter, model.state_dict()
    storage = {name: tensor.data_ptr() for name, tensor in parameters.items()}
    tensors = adapter.to_hf(parameters, quantization=scaled == "F8_E4M3", for_checkpoint_load=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns that it is not distributed
        dcp.load(tensors, storage_reader=dcp.HuggingFaceStorageReader(str(tmp_path / "hf")))
    native = adapter.from_hf(tensors)
    assert native.keys() == parameters.keys()
    if scaled == "F32":  # written through: nothing is left to copy
        assert {name: tensor.data_ptr() for name, tensor in native.items()} == storage
    model.load_state_dict(native, strict=True)
    assert torch.equal(logits(model), logits(load(build(cfg, None), checkpoint(cfg, scaled))))
