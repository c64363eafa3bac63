"""What is to be done with the tensors of a Hugging Face state dict: found out, and checked, before anything is done."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from minimax_jax.errors import LayoutError, Problem, raise_if
from minimax_jax.layout.check import EntryCheck
from minimax_jax.layout.specs import Entry
from minimax_jax.layout.table import SCALE_SUFFIX, Row
from torch_bridge.arrays import TORCH_NAMES
from torch_bridge.export import owner_of
from torch_bridge.mesh import Layout, Region, cut, grouped_layout, layout_of
from torch_bridge.names import EXPERT_ROWS, LORA, Names, Sizes, names_an_expert

_FP8 = "F8_E4M3"


@dataclass(frozen=True, kw_only=True)
class Group:
    """One grouped tensor to be made.

    Attributes:
        entry: the whole tensor, of all experts.
        layout: how it lies on ranks; None for a plain tensor.
        owner: the tensor itself, where its matrices are views of it that were filled in place.
    """

    entry: Entry
    layout: Layout | None
    owner: torch.Tensor | None = None

    @property
    def region(self) -> Region:
        """What this rank holds of experts, columns and (side by side) rows."""
        whole = tuple(range(size) for size in self.entry.shape)
        return whole if self.layout is None else self.layout.region(self.entry.shape)

    @property
    def local(self) -> Entry:
        """The entry with this rank's experts alone."""
        experts = self.region[0]
        return self.entry.narrow(slice(experts.start, experts.stop))

    @property
    def matrix_region(self) -> Region:
        """What this rank holds of rows and columns of one matrix."""
        _, cols, rows = self.region
        return rows if self.entry.parts == 1 else range(self.entry.part_shape[0]), cols


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What becomes of every key.

    Attributes:
        groups: grouped tensors to be made.
        dropped: keys of experts that other ranks hold.
        scaled: FP8 weights to be dequantised, and their native names.
        kept: tensors that stay as they are, and their native names.
        lora: keys of LoRA tensors.
    """

    groups: list[Group] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)
    scaled: dict[str, str] = field(default_factory=dict)
    kept: dict[str, str] = field(default_factory=dict)
    lora: list[str] = field(default_factory=list)


def plan(tensors: Mapping[str, Any], sizes: Sizes, experts: Layout | None) -> Plan:
    """Find out what becomes of every tensor of a Hugging Face state dict, which may be partial.

    Args:
        tensors: tensors by key; not changed.
        sizes: of the model.
        experts: how grouped tensors are to lie on ranks. None: as their matrices lie, if those are DTensors.

    Raises:
        LayoutError: everything that is wrong: FP8 without scales, scales without their weight, experts that are
            misnamed, missing, of a wrong shape or dtype, or of which this rank does not hold what it needs.
    """
    stored = _described(tensors)
    result, entries, problems = _sorted(tensors, Names(sizes, tensors), stored)
    problems += _clashes(result, entries)
    problems += (problem for key in result.scaled for problem in _matrix_problems(key, stored, sizes))
    problems += _half_layers(entries)
    for entry in entries.values():
        group, found = _group(entry, tensors, stored, experts)
        problems += found
        if group is not None:
            result.groups.append(group)
            result.dropped.extend(_not_local(group, tensors))
    raise_if(problems, LayoutError)
    return result


def _sorted(
    tensors: Mapping[str, Any], names: Names, stored: Mapping[str, Stored]
) -> tuple[Plan, dict[str, Entry], list[Problem]]:
    """The plan but for what groups; the grouped tensors that are to be made, by native name; keys that are neither."""
    result, entries, problems = Plan(), dict[str, Entry](), list[Problem]()
    for key in tensors:
        place = names.hf(key)
        if LORA in key:
            result.lora.append(key)
        elif place is not None and place.entry.row.grouped:
            entries[place.entry.native] = place.entry
        elif key.endswith(SCALE_SUFFIX):
            problems += _orphan(key, tensors)
        elif place is None and names_an_expert(key):
            problems.append(Problem(what="not the name of an expert's weight", key=key, expected=names.expected))
        else:
            kind = result.scaled if _is_scaled(key, stored) else result.kept
            kind[key] = key if place is None else place.entry.native
    return result, entries, problems


def scaled_weights(tensors: Mapping[str, Any], sizes: Sizes) -> list[str]:
    """The keys of all FP8 weights, experts included.

    Raises:
        LayoutError: FP8 without scales, scales without their weight, or scales that do not fit.
    """
    stored = _described(tensors)
    found = [key for key in tensors if not key.endswith(SCALE_SUFFIX) and _is_scaled(key, stored)]
    problems = [problem for key in tensors if key.endswith(SCALE_SUFFIX) for problem in _orphan(key, tensors)]
    problems += (problem for key in found for problem in _matrix_problems(key, stored, sizes))
    raise_if(problems, LayoutError)
    return found


class Stored(NamedTuple):
    """What a check needs to know of a tensor; a DTensor counts as a whole."""

    dtype: str
    shape: tuple[int, ...]
    file: None = None


def describe(tensor: torch.Tensor) -> Stored:
    """The tensor's dtype, in safetensors' spelling, and global shape."""
    return Stored(TORCH_NAMES.get(tensor.dtype, str(tensor.dtype)), tuple(tensor.shape))


def _described(tensors: Mapping[str, Any]) -> dict[str, Stored]:
    """The tensors among the values of a state dict, which may hold others."""
    return {key: describe(value) for key, value in tensors.items() if isinstance(value, torch.Tensor)}


def _native_problems(entry: Entry, tensor: Any) -> Iterator[Problem]:
    """What is wrong with a grouped native tensor."""
    return EntryCheck(entry, "native", _described({entry.native: tensor})).problems()


def wrong_experts(names: Names, state_dict: Mapping[str, Any]) -> Iterator[Problem]:
    """What is wrong with the grouped tensors of a native state dict."""
    for fqn, tensor in state_dict.items():
        entry = names.native(fqn)
        if entry is not None and entry.row.grouped:
            yield from _native_problems(entry, tensor)


def _is_scaled(key: str, stored: Mapping[str, Stored]) -> bool:
    return key + SCALE_SUFFIX in stored or (key in stored and stored[key].dtype == _FP8)


def _clashes(plan: Plan, entries: Mapping[str, Entry]) -> Iterator[Problem]:
    """A problem for each native name that several keys would become."""
    taken = set(entries)
    for key, native in (plan.scaled | plan.kept).items():
        if native in taken:
            yield Problem(what="two tensors for one native tensor", key=key, got=f"another for {native}")
        taken.add(native)


def _orphan(key: str, tensors: Mapping[str, Any]) -> Iterator[Problem]:
    weight = key.removesuffix(SCALE_SUFFIX)
    if weight not in tensors:
        yield Problem(what="scales without their FP8 weight", key=key, expected=weight, got="no such tensor")


def _matrix_problems(key: str, stored: Mapping[str, Stored], sizes: Sizes) -> Iterator[Problem]:
    """What is wrong with an FP8 weight that is not an expert's; its shape is taken for what it is."""
    shape = stored[key].shape if key in stored else ()
    if len(shape) != 2:
        yield Problem(what="FP8 weight that is not a matrix", key=key, got=f"shape {list(shape)}")
        return
    row = Row(native=key, parts=(key,), axes=("rows", "cols"), dtype=_FP8)
    entry = Entry(row=row, native=key, layer=None, keys=((key,),), part_shape=shape, block=sizes.block)
    yield from EntryCheck(entry, "hf", stored).problems()


def _half_layers(entries: Mapping[str, Entry]) -> Iterator[Problem]:
    """A problem for each layer of whose experts some grouped tensors are not there at all."""
    for module in dict.fromkeys(native.rpartition(".")[0] for native in entries):
        for row in EXPERT_ROWS:
            native = f"{module}.{row.native.rpartition('.')[2]}"
            if native not in entries:
                remedy = "an incomplete download? fetch it again"
                yield Problem(what="missing experts", key=native, got="other experts of this layer", remedy=remedy)


def _group(
    entry: Entry, tensors: Mapping[str, Any], stored: Mapping[str, Stored], experts: Layout | None
) -> tuple[Group | None, list[Problem]]:
    """How an entry is to be made, and what is wrong with its matrices."""
    present = [tensors[key] for keys in entry.keys for key in keys if key in stored]
    owner = owner_of(present)
    try:
        layout = layout_of(owner) if owner is not None else experts or _inherited(entry, present)
        group = Group(entry=entry, layout=layout, owner=owner)
        local = group.local
    except LayoutError as error:
        return None, [dataclasses.replace(problem, key=entry.native) for problem in error.problems]
    problems = list(EntryCheck(local, "hf", stored).problems())
    if not problems and owner is None:
        problems += _not_held(group, tensors)
    return group, problems


def _inherited(entry: Entry, matrices: list[torch.Tensor]) -> Layout | None:
    layouts = (layout for layout in map(layout_of, matrices) if layout is not None)
    first = next(layouts, None)
    return None if first is None else grouped_layout(first, entry.parts)


def _not_held(group: Group, tensors: Mapping[str, Any]) -> Iterator[Problem]:
    """A problem for each matrix of which this rank does not hold what it needs."""
    for keys in group.local.keys:
        for key in keys:
            try:
                cut(tensors[key], group.matrix_region)
            except LayoutError as error:
                yield from (dataclasses.replace(problem, key=key) for problem in error.problems)


def _not_local(group: Group, tensors: Mapping[str, Any]) -> Iterator[str]:
    experts = group.region[0]
    for expert, keys in enumerate(group.entry.keys):
        if expert not in experts:
            for key in keys:
                yield from (name for name in (key, key + SCALE_SUFFIX) if name in tensors)
