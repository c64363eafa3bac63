"""MiniMax-M2 checkpoints for torch: NeMo AutoModel's adapter, streaming into and out of modules, shared tensors."""

try:
    import torch  # noqa: F401 - for the message
except ImportError as error:
    raise ImportError("torch_bridge needs torch: pip install 'minimax_jax[torch]'", name="torch") from error

from torch_bridge.adapter import NON_QUANTIZED_KEY_PATTERNS, MiniMaxM2StateDictAdapter, should_quantize_key
from torch_bridge.arrays import to_jax, to_torch
from torch_bridge.load import load_into
from torch_bridge.save import save_hf

__all__ = [
    "NON_QUANTIZED_KEY_PATTERNS",
    "MiniMaxM2StateDictAdapter",
    "load_into",
    "save_hf",
    "should_quantize_key",
    "to_jax",
    "to_torch",
]
