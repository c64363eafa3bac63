"""Native trees with the layers stacked, for models that scan over layers, and back.

The stacked name of a tensor is its native name without the layer's number: `model.layers.0.mlp.gate.weight`
[expert, hidden] of every layer becomes `model.layers.mlp.gate.weight` [layer, expert, hidden]. Tensors outside of the
layers stay as they are.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Collection, Iterator, Mapping

import jax

from minimax_jax.conversion import Leaf
from minimax_jax.display import counted
from minimax_jax.errors import LayoutError, Problem, raise_if
from minimax_jax.layout.config import MiniMaxConfig
from minimax_jax.layout.specs import Entry, specs
from minimax_jax.ops.experts import stack

_LAYER = ".{layer}"


def stack_layers(native: Mapping[str, Leaf], config: MiniMaxConfig) -> dict[str, Leaf]:
    """Stack the layers of a native tree along a new leading axis.

    Args:
        native: leaves by native name, all of them. Not changed.
        config: the checkpoint's config.

    Returns:
        New arrays (or `BlockScaled`s of new arrays) [layer, ...] by stacked name; the other leaves are the caller's.

    Raises:
        LayoutError: names that are missing or unexpected, or leaves that differ from layer to layer.
    """
    groups = stacked_entries(config)
    raise_if(name_problems(native, [entry.native for group in groups.values() for entry in group]), LayoutError)
    raise_if((p for group in groups.values() for p in _unequal(group, native)), LayoutError)
    stacked: dict[str, Leaf] = {}
    for name, group in groups.items():
        leaves = [native[entry.native] for entry in group]
        layered = group[0].row.per_layer
        stacked[name] = jax.tree.map(lambda *layers: stack(layers), *leaves) if layered else leaves[0]
    return stacked


def unstack_layers(stacked: Mapping[str, Leaf], config: MiniMaxConfig) -> dict[str, Leaf]:
    """The inverse of `stack_layers`.

    Raises:
        LayoutError: names that are missing or unexpected, or leaves without a leading axis of all layers.
    """
    groups = stacked_entries(config)
    raise_if(name_problems(stacked, groups), LayoutError)
    raise_if((p for name, group in groups.items() for p in _uneven(name, group, stacked)), LayoutError)
    by_name = {
        entry.native: jax.tree.map(operator.itemgetter(layer), stacked[name]) if entry.row.per_layer else stacked[name]
        for name, group in groups.items()
        for layer, entry in enumerate(group)
    }
    return {entry.native: by_name[entry.native] for entry in specs(config).entries}


@functools.lru_cache(maxsize=8)
def stacked_entries(config: MiniMaxConfig) -> dict[str, tuple[Entry, ...]]:
    """For each stacked name, the entries of its layers in order; one entry for a tensor outside of the layers."""
    groups: dict[str, tuple[Entry, ...]] = {}
    for entry in specs(config).entries:
        name = entry.row.native.replace(_LAYER, "")
        groups[name] = (*groups.get(name, ()), entry)
    return groups


def is_stacked(names: Collection[str], config: MiniMaxConfig) -> bool:
    """Whether these are the names of a stacked tree; False where both forms share them all."""
    return any(group[0].row.per_layer and name in names for name, group in stacked_entries(config).items())


def name_problems(got: Collection[str], expected: Collection[str]) -> Iterator[Problem]:
    """A problem for each name that is missing or unexpected."""
    wanted = frozenset(expected)
    yield from (Problem(what="missing tensor", key=name) for name in expected if name not in got)
    yield from (Problem(what="unexpected tensor", key=name) for name in got if name not in wanted)


def _unequal(group: tuple[Entry, ...], native: Mapping[str, Leaf]) -> Iterator[Problem]:
    first, *others = (_form(native[entry.native]) for entry in group)
    for entry, form in zip(group[1:], others, strict=True):
        if form != first:
            what = f"cannot be stacked with {group[0].native}"
            yield Problem(what=what, key=entry.native, expected=first, got=form)


def _form(leaf: Leaf) -> str:
    """Everything about a leaf but its values."""
    return str(jax.tree.map(lambda array: jax.ShapeDtypeStruct(array.shape, array.dtype), leaf))  # type: ignore[no-untyped-call]


def _uneven(name: str, group: tuple[Entry, ...], stacked: Mapping[str, Leaf]) -> Iterator[Problem]:
    if not group[0].row.per_layer:
        return
    shapes = [tuple(array.shape) for array in jax.tree.leaves(stacked[name])]
    if any(shape[:1] != (len(group),) for shape in shapes):
        expected = f"a leading axis of {counted(len(group), 'layer')}"
        yield Problem(what="not a tensor of stacked layers", key=name, expected=expected, got=str(shapes))
