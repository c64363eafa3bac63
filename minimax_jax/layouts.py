"""Native trees to further layouts and back, as pure functions over flat trees: transformers' fused experts, MaxText.

    nest(to_layout(native, config, layout="maxtext"))["params"]  # what MaxText calls its params

Every function works on concrete arrays, and under `jax.jit` and `jax.eval_shape`. Inputs are never changed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from minimax_jax.conversion import block_problems, describe, stored_tree
from minimax_jax.display import counted
from minimax_jax.errors import LayoutError, Problem, raise_if
from minimax_jax.layout.arrangement import arrange
from minimax_jax.layout.check import survey
from minimax_jax.layout.config import MiniMaxConfig
from minimax_jax.layout.forms import FURTHER, HOLDING_FP8, Layout
from minimax_jax.layout.specs import Entry
from minimax_jax.layout.table import SCALE_SUFFIX
from minimax_jax.leaves import Leaf, arranged, native_leaf, restored
from minimax_jax.ops.axes import stack_along
from minimax_jax.ops.checks import Array


def to_layout(
    native: Mapping[str, Leaf], config: MiniMaxConfig, *, layout: Layout, partial: bool = False
) -> dict[str, Array]:
    """Convert a native tree to a further layout; the inverse of `from_layout`.

    Args:
        native: leaves by native name, as `from_hf` gives them. Not changed.
        config: the checkpoint's config.
        layout: `transformers-v5`, the state dict of transformers' module; `maxtext`, with scanned layers; or
            `maxtext-unscanned`. For `to_hf` see there.
        partial: allow native tensors to be absent; all layers of a stack or none.

    Returns:
        Arrays by name, paths in MaxText's tree with dots between the steps (see `nest`). New arrays, or for numpy
        arrays views where memory allows; FP8 weights beside their `_scale_inv`. dtypes are kept.

    Raises:
        LayoutError: there is no such layout, or it has no place for FP8; what is missing, unexpected, or of a wrong
            shape or dtype.
    """
    _require_further(layout)
    tensors = stored_tree(native)
    checked = survey(describe(tensors), config, layout="native", partial=partial)
    fp8 = [name for name, dtype in checked.dtypes.items() if dtype == "F8_E4M3"] if layout not in HOLDING_FP8 else []
    raise_if([*block_problems(native, checked), *_fp8_problems(fp8, layout)], LayoutError)
    stacks: dict[str, list[Array]] = {}
    axes: dict[str, int | None] = {}
    for entry in checked.entries:
        stored = {key: tensors[key] for key in _names(entry) if key in tensors}
        for name, piece in arranged(entry, stored, layout).items():
            stacks.setdefault(name, []).append(piece)
            axes[name] = arrange(entry, layout).layer_axis
    raise_if(_unstackable(stacks, axes, config), LayoutError)
    return {name: _stacked(pieces, axes[name]) for name, pieces in stacks.items()}


def from_layout(
    tree: Mapping[str, Array], config: MiniMaxConfig, *, layout: Layout, partial: bool = False
) -> dict[str, Leaf]:
    """Convert the tensors of a further layout to a native tree; the inverse of `to_layout`.

    Args:
        tree: arrays by name, as `to_layout` gives them (see `flatten`). Not changed.
        config: the checkpoint's config.
        layout: as in `to_layout`.
        partial: allow tensors to be absent.

    Returns:
        Arrays by native name, FP8 weights as `BlockScaled`. New arrays, or for numpy arrays views where memory allows.

    Raises:
        LayoutError: there is no such layout; what is missing, unexpected, or of a wrong shape or dtype.
    """
    _require_further(layout)
    tensors = stored_tree(tree)
    checked = survey(describe(tensors), config, layout=layout, partial=partial)
    native: dict[str, Leaf] = {}
    for entry in checked.entries:
        axis = arrange(entry, layout).layer_axis
        names = [name + suffix for name in arrange(entry, layout).names for suffix in ("", SCALE_SUFFIX)]
        own = {name: _layer(tensors[name], axis, entry) for name in names if name in tensors}
        native[entry.native] = native_leaf(entry, restored(entry, own, layout))
    return native


def _names(entry: Entry) -> tuple[str, str]:
    return entry.native, entry.native + SCALE_SUFFIX


def _stacked(pieces: list[Array], axis: int | None) -> Array:
    return pieces[0] if axis is None else stack_along(pieces, axis)


def _layer(array: Array, axis: int | None, entry: Entry) -> Array:
    if axis is None or entry.layer is None:
        return array
    own: Array = array[(slice(None),) * axis + (entry.layer,)]
    return own


def _require_further(layout: str) -> None:
    if layout not in FURTHER:
        remedy = "for hf, use to_hf and from_hf" if layout in ("hf", "native") else None
        raise LayoutError(Problem(what="no such layout", expected=" or ".join(FURTHER), got=layout, remedy=remedy))


def _fp8_problems(names: list[str], layout: str) -> Iterator[Problem]:
    if names:
        what, remedy = f"{layout} has no place for FP8 weights", "dequantise them: from_hf with a dtype"
        yield Problem(what=what, key=names[0], got=counted(len(names), "FP8 weight"), remedy=remedy)


def _unstackable(
    stacks: Mapping[str, list[Array]], axes: Mapping[str, int | None], config: MiniMaxConfig
) -> Iterator[Problem]:
    """A problem for each stack that lacks layers (which, it could not say), or whose layers are of several dtypes."""
    for name, pieces in stacks.items():
        if axes[name] is None:
            continue
        if len(pieces) != config.num_hidden_layers:
            expected, got = counted(config.num_hidden_layers, "layer"), str(len(pieces))
            yield Problem(what="stack of layers with gaps", key=name, expected=expected, got=got)
        dtypes = sorted({str(piece.dtype) for piece in pieces})
        if len(dtypes) > 1:
            what, remedy = "layers differ in dtype: they cannot be stacked", "cast them, or take another layout"
            yield Problem(what=what, key=name, expected="one dtype", got=" and ".join(dtypes), remedy=remedy)
