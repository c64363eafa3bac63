"""NeMo's own MiniMax-M2 model with its adapter swapped for ours, beside transformers' model on the same FP8 folder."""

import warnings

import folders
import pytest
import torch
import torch.distributed.checkpoint as dcp
import transformers
from helpers import config, random_hf
from nemo_oracle import MiniMaxM2StateDictAdapter, checkpoint, differences
from torch_modules import SIZES, build, load, logits


@pytest.fixture(scope="module")
def cfg():
    return config(**SIZES)


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
