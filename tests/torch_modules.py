"""Modules to load into and to save: NeMo's and transformers' own."""

import contextlib

import numpy as np
import torch
import transformers
from helpers import SUFFIX
from nemo_oracle import MiniMaxM2StateDictAdapter
from plain_modules import fused_of, module_of
from test_torch_model import SIZES, build, logits
from torch_helpers import to_torch

from minimax_jax.io.reader import Reader

__all__ = [
    "SIZES",
    "count_reads",
    "from_transformers",
    "fused_of",
    "logits",
    "module_of",
    "nemo",
    "poison",
    "tensors_of",
]


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
