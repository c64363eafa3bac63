"""A native tensor as Hugging Face tensors: as data, as FP8 data, or as destinations that a loader will overwrite."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch.distributed.tensor import DTensor

from minimax_jax.errors import LayoutError, NumericError
from minimax_jax.layout.specs import Entry
from minimax_jax.layout.table import SCALE_SUFFIX
from minimax_jax.ops.checks import grid_shape
from torch_bridge import experts, matrices
from torch_bridge.fp8 import FP8
from torch_bridge.mesh import layout_of, local_of, matrix_layout, region_of


class Weight(NamedTuple):
    """One Hugging Face weight of a native tensor.

    Attributes:
        key: its name.
        value: the weight; of a grouped tensor a view, transposed.
        entry: what it belongs to.
        owner: the native tensor.
    """

    key: str
    value: torch.Tensor
    entry: Entry
    owner: torch.Tensor


Tensors = Iterator[tuple[str, torch.Tensor]]
Form = Callable[[Weight], Tensors]
"""Makes the stored tensors of a weight."""

_OWNER = "_minimax_owner"
"""Attribute of a view of a native tensor's storage: that tensor. The state travels with the data, not in an adapter."""


def weights(entry: Entry, tensor: torch.Tensor) -> Iterator[Weight]:
    """The weights of a native tensor, which must have been checked; of a grouped one, those of this rank's experts.

    They are views: plain tensors where at most the experts are sharded, and DTensors where more is.

    Raises:
        LayoutError: a layout that cannot be taken apart.
    """
    if not entry.row.grouped:
        yield Weight(entry.keys[0][0], tensor, entry, tensor)
        return
    grouped, local = layout_of(tensor), local_of(tensor).detach()
    layout = None if grouped is None else matrix_layout(grouped, entry.parts)
    for here, expert in enumerate(region_of(tensor)[0]):
        for key, part in zip(entry.keys[expert], local[here].chunk(entry.parts, dim=1), strict=True):
            value = part.T if layout is None else layout.wrap(part.T, entry.part_shape)
            yield Weight(key, value, entry, tensor)


def name(weight: Weight) -> Tensors:
    """The weight as it is: for its name."""
    yield weight.key, weight.value


def data(weight: Weight) -> Tensors:
    """The weight in its dtype: a contiguous copy of an expert's, any other as it is."""
    yield weight.key, _contiguous(weight.value) if weight.entry.row.grouped else weight.value


def fp8_data(weight: Weight) -> Tensors:
    """Codes and real scales of a block-scaled weight, any other as it is.

    Raises:
        LayoutError: the weight is not a matrix, or of no float dtype.
        NumericError: NaN or infinity in the weight.
    """
    if not weight.entry.row.scaled:
        yield from data(weight)
        return
    ((_, value),) = data(weight)
    try:
        values, scale_inv = matrices.quantize(value, block=weight.entry.block)
    except (LayoutError, NumericError) as error:
        raise type(error)(dataclasses.replace(problem, key=weight.key) for problem in error.problems) from error
    yield weight.key, values
    yield weight.key + SCALE_SUFFIX, scale_inv


def destination(weight: Weight) -> Tensors:
    """What a loader writes a weight to: the native tensor's own storage, wherever a plain view of it will do.

    `owner_of` finds the native tensor again.
    """
    if not weight.entry.row.grouped or isinstance(weight.value, DTensor):
        yield from data(weight)
        return
    setattr(weight.value, _OWNER, weight.owner)
    yield weight.key, weight.value


def fp8_destination(weight: Weight) -> Tensors:
    """What a loader writes the codes and scales of a block-scaled weight to: no codes, scales of one, not data."""
    if not weight.entry.row.scaled:
        yield from data(weight)
        return
    layout, local = layout_of(weight.value), local_of(weight.value)
    codes = torch.empty(local.shape, dtype=FP8, device=local.device)
    yield weight.key, codes if layout is None else layout.wrap(codes, weight.value.shape)
    grid = grid_shape(tuple(weight.value.shape), weight.entry.block)
    yield weight.key + SCALE_SUFFIX, torch.ones(grid, dtype=torch.float32, device=local.device)


def form_of(quantization: bool, for_checkpoint_load: bool) -> Form:
    """What a weight becomes, by what NeMo's callers say."""
    if for_checkpoint_load:
        return fp8_destination if quantization else destination
    return fp8_data if quantization else data


def owner_of(values: Sequence[torch.Tensor]) -> torch.Tensor | None:
    """The native tensor of whose storage all `values` are views that `destination` made; None where they are not."""
    owners = [getattr(value, _OWNER, None) for value in values]
    first: torch.Tensor | None = owners[0] if owners else None
    return first if all(owner is first for owner in owners) else None


def _contiguous(value: torch.Tensor) -> torch.Tensor:
    layout = layout_of(value)
    copy = experts.contiguous(local_of(value))
    return copy if layout is None else layout.wrap(copy, value.shape)
