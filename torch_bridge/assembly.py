"""A grouped tensor of this rank, made of the matrices of a state dict, which lets go of them one by one."""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping
from typing import Any

import torch

from minimax_jax.layout.table import SCALE_SUFFIX
from torch_bridge import memory
from torch_bridge.experts import Filling, Part, fill
from torch_bridge.mesh import cut, local_of, whole
from torch_bridge.plan import Group


def assemble(group: Group, tensors: MutableMapping[str, Any], dtype: torch.dtype) -> torch.Tensor:
    """This rank's part of a grouped tensor, as a DTensor where it has a layout; its matrices leave `tensors`.

    Args:
        group: what is to be made, checked.
        tensors: where its matrices and their scales are.
        dtype: of the result.

    Returns:
        A new tensor, or `group.owner`, which has been filled already.
    """
    local, layout = group.local, group.layout
    if group.owner is not None:
        for keys in local.keys:
            for key in keys:
                del tensors[key]
        return group.owner
    like = next((local_of(tensors[key]) for keys in local.keys for key in keys), torch.empty(0))
    out = memory.empty([len(part) for part in group.region], dtype, like.device)
    fill(out, _fillings(group, out, tensors), group.entry.block)
    return out if layout is None else layout.wrap(out, group.entry.shape)


def _fillings(group: Group, out: torch.Tensor, tensors: MutableMapping[str, Any]) -> Iterator[Filling]:
    """What fills `out`, this rank's part of a grouped tensor; matrices leave `tensors` as they are asked for."""
    region = group.matrix_region
    offset = (region[0].start, region[1].start)
    for expert, keys in zip(out, group.local.keys, strict=True):
        scales = [tensors.pop(key + SCALE_SUFFIX, None) for key in keys]
        parts = (
            Part(cut(tensors.pop(key), region), None if scale_inv is None else whole(scale_inv), offset)
            for key, scale_inv in zip(keys, scales, strict=True)
        )
        yield Filling(expert, tuple(parts))
