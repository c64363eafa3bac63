"""Expert LoRA of torch state dicts, between NeMo's grouped form and PEFT's: `minimax_jax.lora` on torch tensors.

CPU tensors are shared with it, both ways; those of another device make a round trip through the CPU. Of tensors on the
meta device come shapes.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, TypeAlias

import jax
import numpy as np
import torch
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

from minimax_jax import lora
from minimax_jax.dtypes import DTYPES
from minimax_jax.errors import LayoutError, Problem
from minimax_jax.layout.config import MiniMaxConfig
from minimax_jax.layout.lora import find
from minimax_jax.layout.lora import problems as problems_of
from minimax_jax.layout.table import is_expert_lora
from torch_bridge.arrays import TORCH, TORCH_NAMES, as_numpy, to_torch
from torch_bridge.mesh import local_of, region_of, whole

Tensors: TypeAlias = dict[str, torch.Tensor]
Arrays: TypeAlias = dict[str, Any]

Names: TypeAlias = lora.Names

_LAYOUTS = {None: None, "peft-0.19.1": False, "peft-0.18": True}
"""Whether a ParamWrapper is of the legacy layout, by the name that NeMo stores beside an adapter."""


_GROUPED_AXES = ("experts", "rows or rank", "rank or cols")
"""Axes of a grouped factor; those of every other form have two."""


class Form(NamedTuple):
    """What grouped factors become.

    Attributes:
        per_expert: LoRA of one linear layer for each expert; else PEFT's ParamWrapper.
        names: whose names of experts: NeMo's, or the published ones.
        concatenated: take apart ranks that were concatenated, so that gate and up get an A each; of per-expert LoRA.
        legacy: ParamWrapper as PEFT 0.19.0 and older laid it out.
    """

    per_expert: bool = False
    names: Names = "nemo"
    concatenated: bool = False
    legacy: bool = False


def group(
    tensors: Mapping[str, Any], config: MiniMaxConfig, *, concatenate: bool = False, legacy: bool | None = None
) -> dict[str, Any]:
    """Expert LoRA of any form to NeMo's grouped one; what else there is passes as it is.

    Args:
        tensors: tensors by name; DTensors are gathered. Not changed.
        config: sizes of the adapted model.
        concatenate: see `minimax_jax.lora.group_lora`.
        legacy: see `minimax_jax.lora.from_param_wrapper`.

    Raises:
        LayoutError: as from these two.
    """

    def convert(arrays: Arrays) -> Arrays:
        grouped = lora.group_lora(arrays, config, concatenate=concatenate)
        return lora.from_param_wrapper(grouped, config, legacy=legacy)

    experts = {key: whole(tensor) for key, tensor in tensors.items() if is_factor(key, tensor)}
    if not experts:
        return dict(tensors)
    return {key: tensor for key, tensor in tensors.items() if key not in experts} | _through(convert, experts)


def ungroup(name: str, tensor: torch.Tensor, config: MiniMaxConfig, form: Form) -> Tensors:
    """One grouped factor in another form; a tensor of another form passes as it is.

    Args:
        name: its native name.
        tensor: a DTensor is gathered, by a collective of its mesh, unless only its experts are sharded and the form is
            per expert.
        config: sizes of the adapted model.
        form: which form.

    Returns:
        New tensors, all of them plain. Per expert, those of the experts that this rank holds.

    Raises:
        LayoutError: concatenated ranks that cannot be taken apart.
    """
    if not form.per_expert:

        def convert(arrays: Arrays) -> Arrays:
            return lora.to_param_wrapper(arrays, config, legacy=form.legacy, partial=True)

        return _through(convert, {name: whole(tensor)})
    if tensor.ndim != len(_GROUPED_AXES):
        return {name: tensor}
    experts = region_of(tensor)[0] if isinstance(tensor, DTensor) else range(len(tensor))
    return dict(_of_experts(name, _with_whole_experts(tensor), experts, config, form))


def merge_lora(
    native: Mapping[str, Any], factors: Mapping[str, torch.Tensor], config: MiniMaxConfig, *, scaling: float
) -> dict[str, Any]:
    """`minimax_jax.merging.merge_lora` of torch tensors: add LoRA to the weights it adapts.

    Args:
        native: plain native tensors, or those of them that are adapted. Not changed.
        factors: grouped expert LoRA, as `from_hf` gives it, and LoRA of linear layers as PEFT stores it.
        config: of the checkpoint, whole: LoRA of any matrix is checked against it.
        scaling: `alpha / rank`, or `alpha / sqrt(rank)` for rank-stabilised LoRA; of the adapter's own rank, not the
            doubled one of `concatenate_lora`.

    Returns:
        A new dict; adapted weights are new, others the caller's own.

    Raises:
        LayoutError: LoRA that nothing in `native` is there for, an A without its B, wrong shapes or dtypes, DTensors.
    """
    base = {name: tensor for name, tensor in native.items() if isinstance(tensor, torch.Tensor)}

    def convert(arrays: Arrays) -> Arrays:
        weights, added = ({name: arrays[name] for name in names} for names in (base, factors))
        return lora.merge_lora(weights, added, config, scaling=scaling)

    return dict(native) | _through(convert, {**base, **factors})


def problems(tensors: Mapping[str, Any], config: MiniMaxConfig) -> Iterator[Problem]:
    """What is wrong with the names, shapes and dtypes of the grouped factors of a native state dict."""
    shapes = {key: _abstract(tensor) for key, tensor in tensors.items() if is_factor(key, tensor)}
    if shapes:
        yield from problems_of(find(shapes, config, "grouped", partial=True), shapes, "grouped")


def legacy_of(layout: str | None) -> bool | None:
    """Whether ParamWrapper LoRA is of the legacy layout, by NeMo's name of its layout; None where that is not known.

    Raises:
        LayoutError: a name that NeMo does not give.
    """
    if layout not in _LAYOUTS:
        expected = " or ".join(name for name in _LAYOUTS if name)
        raise LayoutError(Problem(what="unknown layout of PEFT's ParamWrapper", expected=expected, got=repr(layout)))
    return _LAYOUTS[layout]


def is_factor(key: str, tensor: Any) -> bool:
    """Whether something is expert LoRA, of any form."""
    return isinstance(tensor, torch.Tensor) and is_expert_lora(key)


def _of_experts(
    name: str, local: torch.Tensor, experts: range, config: MiniMaxConfig, form: Form
) -> Iterator[tuple[str, torch.Tensor]]:
    """The factors of some experts, which `local` holds, under the names that they have among all."""

    def convert(arrays: Arrays, sizes: MiniMaxConfig) -> Arrays:
        return lora.ungroup_lora(arrays, sizes, names=form.names, concatenated=form.concatenated, partial=True)

    if not experts:
        return
    if len(experts) == config.num_local_experts:
        yield from _through(lambda arrays: convert(arrays, config), {name: local}).items()
        return
    every = jax.ShapeDtypeStruct((config.num_local_experts, *local.shape[1:]), _abstract(local).dtype)  # type: ignore[no-untyped-call]
    keys = list(_shapes(lambda arrays: convert(arrays, config), {name: every}))
    each = len(keys) // config.num_local_experts
    sizes = config.replace(num_local_experts=len(experts))
    mine = itertools.islice(keys, each * experts.start, each * experts.stop)
    yield from zip(mine, _through(lambda arrays: convert(arrays, sizes), {name: local}).values(), strict=True)


def _with_whole_experts(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's experts of a grouped factor, all of each."""
    if not isinstance(tensor, DTensor):
        return tensor
    placements: list[Placement] = [p if p == Shard(0) else Replicate() for p in tensor.placements]
    return local_of(tensor.redistribute(placements=placements) if list(tensor.placements) != placements else tensor)


def _through(convert: Callable[[Arrays], Arrays], tensors: Tensors) -> Tensors:
    """A conversion of arrays on tensors: what it passes on is the caller's own, what it makes shares no memory."""
    device = next((tensor.device for tensor in tensors.values()), torch.device("cpu"))
    if device.type == "meta":
        shapes = _shapes(convert, {key: _abstract(tensor) for key, tensor in tensors.items()})
        return {key: _empty(shape) for key, shape in shapes.items()}
    arrays = {key: as_numpy(tensor.cpu()) for key, tensor in tensors.items()}
    own = {id(array): tensors[key] for key, array in arrays.items()}
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        made = convert(arrays)
        jax.block_until_ready(list(made.values()))  # type: ignore[no-untyped-call]
    taken: set[int] = set()
    out = {}
    for key, array in made.items():
        tensor = own.get(id(array))
        out[key] = tensor if tensor is not None else _unshared(array, taken).to(device)
    return out


def _shapes(convert: Callable[[Arrays], Arrays], arrays: Mapping[str, Any]) -> dict[str, jax.ShapeDtypeStruct]:
    """What a conversion would give, in its order: as a tree, JAX would sort a dict by its keys."""
    keys: list[str] = []

    def values(arrays: Arrays) -> list[Any]:
        made = convert(arrays)
        keys.extend(made)
        return list(made.values())

    return dict(zip(keys, jax.eval_shape(values, dict(arrays)), strict=True))


def _unshared(array: jax.Array | np.ndarray[Any, Any], taken: set[int]) -> torch.Tensor:
    """A tensor of an array that no other tensor shares: those of one array would not be written to a file."""
    tensor = to_torch(array)
    if id(array) in taken:
        return tensor.clone()
    taken.add(id(array))
    return tensor


def _abstract(tensor: torch.Tensor) -> jax.ShapeDtypeStruct:
    name = TORCH_NAMES.get(tensor.dtype)
    if name is None:
        raise LayoutError(Problem(what="unsupported dtype", got=str(tensor.dtype)))
    return jax.ShapeDtypeStruct(tuple(tensor.shape), DTYPES[name])  # type: ignore[no-untyped-call]


def _empty(shape: jax.ShapeDtypeStruct) -> torch.Tensor:
    dtype = next(name for name, dtype in DTYPES.items() if dtype == shape.dtype)
    return torch.empty(shape.shape, dtype=TORCH[dtype], device="meta")
