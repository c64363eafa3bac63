"""NeMo AutoModel as the judge of `torch_bridge`: its adapter beside ours, on the same random checkpoints."""

import importlib
import warnings

import helpers
import torch
from helpers import random_hf

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # torch warns of itself when NeMo is imported
    from nemo_automodel.components.checkpoint.state_dict_adapter import StateDictAdapter
    from nemo_automodel.components.models.common import BackendConfig
    from nemo_automodel.components.moe.state_dict_mixin import MoESplitExpertsStateDictMixin
    from nemo_automodel.components.moe.state_dict_utils import create_dtensor_from_local
    from torch_helpers import nemo_adapter, to_torch

from torch_bridge import MiniMaxM2StateDictAdapter

__all__ = [
    "BackendConfig",
    "MoESplitExpertsStateDictMixin",
    "StateDictAdapter",
    "assert_same",
    "checkpoint",
    "create_dtensor_from_local",
    "differences",
    "nemo_adapter",
    "nemo_module",
    "our_adapter",
]


def nemo_module(name):
    """A module of NeMo's MiniMax-M2 model."""
    return importlib.import_module(f"nemo_automodel.components.models.minimax_m2.{name}")


def our_adapter(cfg, dtype=torch.bfloat16):
    nemo = nemo_adapter(cfg, dtype)
    return MiniMaxM2StateDictAdapter(nemo.config, nemo.moe_config, nemo.backend, dtype=dtype)


def checkpoint(cfg, scaled="F8_E4M3", *, seed=0):
    """A random Hugging Face state dict of torch tensors."""
    return {key: to_torch(array) for key, array in random_hf(cfg, scaled, seed=seed).items()}


def bits(tensor):
    tensor = tensor.detach().contiguous()
    return (tensor if tensor.ndim else tensor[None]).view(torch.uint8)


def assert_same(got, want):
    assert (got.dtype, got.shape) == (want.dtype, want.shape)
    assert torch.equal(bits(got), bits(want))


def same(got, want):
    """Whether two tensors are the same in dtype, shape and every bit."""
    return (got.dtype, got.shape) == (want.dtype, want.shape) and torch.equal(bits(got), bits(want))


def differences(got, want):
    """Names that only one state dict has, and names of tensors that are not the same."""
    return helpers.differences(got, want, same)
