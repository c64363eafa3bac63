"""Checkpoints of every form to load into torch modules."""

import folders
import ml_dtypes
import numpy as np
import torch
from helpers import random_hf

import minimax_jax as mj

BF16 = np.dtype(ml_dtypes.bfloat16)
SOURCES = ("hf-fp8", "hf-f32", "hf-bf16", "native-f32", "native-bf16", "native-fp8")
ATTENTION = "model.layers.0.self_attn."
EXPERTS = "model.layers.0.mlp.experts."


def write_all(folder, cfg):
    """A random checkpoint in every form; gives its Hugging Face tensors."""
    hf = random_hf(cfg)
    folders.write(folder / "hf-fp8", hf, cfg)
    for name in SOURCES[1:]:
        to, dtype = name.split("-")
        mj.convert(folder / "hf-fp8", folder / name, to=to, dtype=dtype)
    return hf


def blank(tensors):
    return {name: torch.full_like(tensor, float("nan")) for name, tensor in tensors.items()}
