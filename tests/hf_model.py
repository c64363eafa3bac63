"""Tiny random MiniMax-M2 models by transformers, and the same weights as this library reads them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from transformers import MiniMaxM2Config, MiniMaxM2ForCausalLM

import minimax_jax as mj
from minimax_jax.io.checkpoint import open_checkpoint
from minimax_jax.io.reader import Reader
from minimax_jax.models.minimax import MiniMaxForCausalLM
from minimax_jax.synthetic import TINY, synthesize

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "vocab_size": 97,
    "num_local_experts": 6,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 512,
}
"""Heads are wider than the hidden size, two query heads share a KV head, half of each head is rotated."""


@dataclass(frozen=True, kw_only=True)
class Pair:
    """One model, twice: `hf` by transformers and `model` by this library, both of `native`."""

    hf: MiniMaxM2ForCausalLM
    config: mj.MiniMaxConfig
    native: dict[str, Any]
    model: MiniMaxForCausalLM


def random_hf(*, rotated: float = 0.5, seed: int = 0, **changes: Any) -> MiniMaxM2ForCausalLM:
    """A model with every tensor random, norms and the router's bias included."""
    rope = {"rope_type": "default", "rope_theta": 5e6, "partial_rotary_factor": rotated}
    config = MiniMaxM2Config(**SIZES | changes, rope_parameters=rope, bos_token_id=None, eos_token_id=None)
    config._attn_implementation = "eager"
    hf = MiniMaxM2ForCausalLM(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in hf.state_dict().items():
            noise = torch.randn(tensor.shape, generator=generator)
            tensor.copy_(0.3 * noise + (1 if "norm" in name else 0))
    return hf


def load_hf(path: Path, dtype: torch.dtype = torch.float32) -> MiniMaxM2ForCausalLM:
    return MiniMaxM2ForCausalLM.from_pretrained(path, dtype=dtype, attn_implementation="eager").eval()


def read(path: Path) -> tuple[mj.MiniMaxConfig, dict[str, Any]]:
    """Config and Hugging Face tensors of a checkpoint."""
    checkpoint = open_checkpoint(path)
    with Reader(checkpoint) as reader:
        return mj.MiniMaxConfig.from_pretrained(path), {k: reader.read(i) for k, i in checkpoint.tensors.items()}


def pair(path: Path, *, dtype: Any = jnp.float32, **changes: Any) -> Pair:
    """A random model, saved to `path` by transformers and read back."""
    hf = random_hf(**changes)
    hf.save_pretrained(path)
    config, tensors = read(path)
    native = mj.from_hf(tensors, config, dtype=dtype)
    return Pair(hf=hf, config=config, native=native, model=MiniMaxForCausalLM(config, native, dtype=jnp.float32))


def random_ids(*shape: int, vocab: int = SIZES["vocab_size"], seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, vocab, shape).astype(np.int32)


@jax.jit
def logits_and_choices(model: MiniMaxForCausalLM, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
    decoded = model.model(tokens)
    return model.logits(decoded.hidden), decoded.chosen


def hf_logits_and_choices(hf: MiniMaxM2ForCausalLM, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Logits [batch, time, vocab], and the experts of every layer [layer, batch, time, chosen]."""
    chosen: list[np.ndarray] = []
    hooks = [
        layer.mlp.gate.register_forward_hook(lambda module, args, out: chosen.append(out[2].numpy()))
        for layer in hf.model.layers
    ]
    with torch.no_grad():
        logits = hf(torch.from_numpy(tokens).long()).logits.float().numpy()
    for hook in hooks:
        hook.remove()
    return logits, np.stack(chosen).reshape(len(hooks), *tokens.shape, -1)


def read_fp8(path: Path) -> SimpleNamespace:
    """A synthetic checkpoint, written to `path` and read back: its config, tensors and native tree, and a model."""
    synthesize(path, TINY)
    config, tensors = read(path)
    native = mj.from_hf(tensors, config, dtype=None)
    model = MiniMaxForCausalLM(config, native, dtype=jnp.float32)
    return SimpleNamespace(path=path, config=config, tensors=tensors, native=native, model=model)
