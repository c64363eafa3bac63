"""Modules to load into and to save: NeMo's and transformers' own."""

import contextlib

import numpy as np
import pytest
import torch
import transformers
from helpers import SUFFIX
from nemo_oracle import BackendConfig, MiniMaxM2StateDictAdapter, nemo_module
from plain_modules import fused_of, module_of
from torch_helpers import to_torch

from minimax_jax.io.reader import Reader

__all__ = [
    "SIZES",
    "build",
    "count_reads",
    "from_transformers",
    "fused_of",
    "load",
    "logits",
    "module_of",
    "nemo",
    "poison",
    "tensors_of",
]


SIZES = {
    "hidden_size": 256,
    "intermediate_size": 128,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
}


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


def nemo(cfg):
    """NeMo's model, in float32, every tensor NaN."""
    return poison(build(cfg, MiniMaxM2StateDictAdapter))


def from_transformers(cfg, dtype=torch.float32, **changes):
    """transformers' model, every tensor NaN."""
    raw = {name: value for name, value in cfg.to_dict().items() if name not in ("quantization_config", "architectures")}
    known = raw | {"bos_token_id": None, "eos_token_id": None} | changes
    settings = transformers.MiniMaxM2Config.from_dict(known)
    return poison(transformers.AutoModelForCausalLM.from_config(settings, dtype=dtype).eval())


def poison(model):
    for tensor in model.state_dict().values():
        tensor.fill_(float("nan"))
    return model


def tensors_of(native, dtype=None):
    """A numpy tree in torch, with the names of NeMo's module; float tensors in another dtype where one is given."""
    return {
        name: to_torch(np.asarray(array)) if dtype is None else to_torch(np.asarray(array)).to(dtype)
        for name, array in native.items()
        if not name.endswith(SUFFIX)
    }


@contextlib.contextmanager
def count_reads(monkeypatch):
    """What is read of tensors, as (file name, start, stop)."""
    found = []
    original = Reader.read_into

    def read_into(self, file, start, buffer):
        found.append((file.name, start, start + buffer.nbytes))
        original(self, file, start, buffer)

    with monkeypatch.context() as patch:
        patch.setattr(Reader, "read_into", read_into)
        yield found
