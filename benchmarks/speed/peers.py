"""What others offer for the same work: NeMo AutoModel, transformers, plain torch, numpy with ml_dtypes."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from benchmarks.speed.cases import BF16, BLOCK, FP8, Array, Case, dequantize, quantize

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # torch warns of itself when NeMo is imported
    from nemo_automodel.components.models.minimax_m2.state_dict_adapter import MiniMaxM2StateDictAdapter
from transformers.core_model_loading import Concatenate, MergeModulelist
from transformers.integrations.finegrained_fp8 import Fp8Dequantize

Tensors = dict[str, torch.Tensor]


def to_torch(leaf: Array) -> torch.Tensor:
    """A torch tensor over the same memory."""
    views = {FP8: (np.uint8, torch.float8_e4m3fn), BF16: (np.int16, torch.bfloat16)}
    carrier, dtype = views.get(leaf.dtype, (leaf.dtype, None))
    tensor = torch.from_numpy(leaf.view(carrier))
    return tensor if dtype is None else tensor.view(dtype)


def to_numpy(tensors: Mapping[str, torch.Tensor]) -> dict[str, Array]:
    """Arrays of the same bits, 8- and 16-bit floats as integers."""
    carriers = {1: torch.uint8, 2: torch.int16, 4: torch.int32}
    return {name: t.contiguous().view(carriers[t.element_size()]).numpy() for name, t in tensors.items()}


def nemo(case: Case) -> Any:
    """NeMo AutoModel's adapter."""
    moe = SimpleNamespace(
        n_routed_experts=case.config.num_local_experts,
        moe_inter_dim=case.config.intermediate_size,
        expert_activation="swiglu",
        expert_bias=False,
    )
    backend = SimpleNamespace(experts="torch", dispatcher="torch")
    return MiniMaxM2StateDictAdapter(SimpleNamespace(), moe, backend, dtype=torch.bfloat16)


def nemo_from_hf(case: Case) -> Callable[[], Tensors]:
    """Dequantise and group."""
    return lambda: nemo(case).from_hf({name: to_torch(leaf) for name, leaf in case.tree.items()})


def nemo_file_to_file(case: Case, target: Path) -> None:
    """Load, convert, save, flush."""
    tensors: Tensors = {}
    for file in case.files:
        tensors |= load_file(file)
    converted = nemo(case).from_hf(tensors)
    target.mkdir()
    file = target / "model.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in converted.items()}, file)
    with file.open("rb+") as stream:
        os.fsync(stream.fileno())


def transformers_from_hf(case: Case) -> Callable[[], Tensors]:
    """The operations of its loader, which does not transpose: `[experts, parts*rows, cols]`."""
    dequantizer = Fp8Dequantize(SimpleNamespace())

    def entry(name: str, keys: tuple[tuple[str, ...], ...]) -> torch.Tensor:
        patterns = [str(part) for part in range(len(keys[0]))]
        stored: dict[str, list[torch.Tensor]] = {}
        for part, pattern in enumerate(patterns):
            for suffix in ("", "_scale_inv"):
                stored[pattern + suffix] = [to_torch(case.tree[expert[part] + suffix]) for expert in keys]
        weights = {
            pattern: [dequantizer._dequantize_one(*pair, output_dtype=torch.bfloat16) for pair in pairs]
            for pattern in patterns
            for pairs in [zip(stored[pattern], stored[pattern + "_scale_inv"], strict=True)]
        }
        merged = MergeModulelist(dim=0).convert(weights, patterns, patterns)
        if len(patterns) == 1:
            return merged[patterns[0]]
        return Concatenate(dim=1).convert(merged, patterns, [name])[name]

    return lambda: {one.native: entry(one.native, tuple(map(tuple, one.keys))) for one in case.entries}


def torch_from_hf(case: Case) -> Callable[[], Tensors]:
    """All blocks of a matrix at once."""

    def matrix(key: str) -> torch.Tensor:
        scales = to_torch(case.tree[key + "_scale_inv"]).repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)
        return (to_torch(case.tree[key]).float() * scales).bfloat16()

    def run() -> Tensors:
        return {
            entry.native: torch.stack([torch.cat([matrix(key) for key in keys]).T for keys in entry.keys]).contiguous()
            for entry in case.entries
        }

    return run


def torch_to_hf(case: Case) -> Callable[[], Tensors]:
    """Ungroup and quantise, all blocks of a matrix at once."""

    def run() -> Tensors:
        made: Tensors = {}
        for entry in case.entries:
            for keys, weights in zip(entry.keys, to_torch(case.weights[entry.native]), strict=True):
                for key, part in zip(keys, weights.chunk(len(keys), dim=1), strict=True):
                    made[key], made[key + "_scale_inv"] = _quantize(part.T)
        return made

    return run


def _quantize(weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    rows, cols = weights.shape
    blocks = weights.float().reshape(rows // BLOCK, BLOCK, cols // BLOCK, BLOCK)
    amax = blocks.abs().amax(dim=(1, 3), keepdim=True)
    scales = torch.where(amax == 0, torch.ones_like(amax), amax / 448)
    return (blocks / scales).reshape(rows, cols).to(torch.float8_e4m3fn), scales[:, 0, :, 0]


def numpy_from_hf(case: Case) -> Callable[[], dict[str, Array]]:
    """The formula as it stands."""

    def run() -> dict[str, Array]:
        return {
            entry.native: np.stack(
                [
                    np.concatenate([dequantize(case.tree[key], case.tree[key + "_scale_inv"]) for key in keys]).T
                    for keys in entry.keys
                ]
            )
            for entry in case.entries
        }

    return run


def numpy_to_hf(case: Case) -> Callable[[], list[tuple[Array, Array]]]:
    """The formula as it stands."""
    return lambda: [
        quantize(part.T)
        for entry in case.entries
        for weights in case.weights[entry.native]
        for part in np.split(weights, entry.parts, axis=1)
    ]
