"""numpy <-> torch, bit for bit, and NeMo AutoModel's own adapter."""

import warnings
from types import SimpleNamespace

import ml_dtypes
import numpy as np
import torch

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of torch, about itself
    from nemo_automodel.components.models.minimax_m2.state_dict_adapter import MiniMaxM2StateDictAdapter

_VIEWS = {
    np.dtype(ml_dtypes.bfloat16): (np.uint16, torch.bfloat16),
    np.dtype(ml_dtypes.float8_e4m3fn): (np.uint8, torch.float8_e4m3fn),
}


def to_torch(array):
    """A copy."""
    array = np.array(array, order="C")
    integer, dtype = _VIEWS.get(array.dtype, (array.dtype, None))
    tensor = torch.from_numpy(array.view(integer))
    return tensor if dtype is None else tensor.view(dtype)


def to_numpy(tensor):
    """A view, or a copy of what is not contiguous."""
    tensor = tensor.detach().contiguous()
    for dtype, (integer, torch_dtype) in _VIEWS.items():
        if tensor.dtype == torch_dtype:
            return tensor.view(getattr(torch, np.dtype(integer).name)).numpy().view(dtype)
    return tensor.numpy()


def in_torch(tree):
    return {key: to_torch(np.asarray(array)) for key, array in tree.items()}


def in_numpy(tree):
    return {key: to_numpy(tensor) for key, tensor in tree.items()}


def nemo_adapter(cfg, dtype=torch.bfloat16):
    moe = SimpleNamespace(
        n_routed_experts=cfg.num_local_experts,
        moe_inter_dim=cfg.intermediate_size,
        dim=cfg.hidden_size,
        expert_activation="swiglu",
        expert_bias=False,
    )
    backend = SimpleNamespace(experts="torch", dispatcher="torch")
    return MiniMaxM2StateDictAdapter(SimpleNamespace(), moe, backend, dtype=dtype)


def nemo_from_hf(hf, cfg, dtype):
    return in_numpy(nemo_adapter(cfg, dtype).from_hf(in_torch(hf)))
