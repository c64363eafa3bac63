"""MiniMax-M2 checkpoints for torch: NeMo AutoModel's adapter, and tensors shared with JAX."""

from torch_bridge.adapter import NON_QUANTIZED_KEY_PATTERNS, MiniMaxM2StateDictAdapter, should_quantize_key
from torch_bridge.arrays import to_jax, to_torch

__all__ = ["NON_QUANTIZED_KEY_PATTERNS", "MiniMaxM2StateDictAdapter", "should_quantize_key", "to_jax", "to_torch"]
