"""One leaf of a native tree, from and to its Hugging Face tensors: what whole trees and streaming jobs are made of.

Nothing here checks names, shapes or dtypes: `minimax_jax.layout.check` has done that for all tensors at once.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import TypeAlias, TypedDict, cast

import jax
import numpy as np
from jax.typing import DTypeLike

from minimax_jax.errors import NumericError, Problem, raise_if
from minimax_jax.layout.arrangement import Arrangement, arrange
from minimax_jax.layout.specs import Entry
from minimax_jax.layout.table import SCALE_SUFFIX
from minimax_jax.ops import axes
from minimax_jax.ops.assemble import Experts, Matrix, assemble, encode, split
from minimax_jax.ops.checks import Array
from minimax_jax.ops.fp8 import FP8
from minimax_jax.ops.scaled import BlockScaled

Leaf: TypeAlias = Matrix
"""A leaf of a native tree: a JAX or numpy array, or a `BlockScaled` where weights stay FP8."""


def load(entry: Entry, tensors: Mapping[str, Array], dtype: DTypeLike | None) -> Leaf:
    """One native leaf from its Hugging Face tensors.

    Args:
        entry: which leaf.
        tensors: its Hugging Face tensors by name, scales included.
        dtype: dtype of dequantised weights and of grouped experts; None keeps what is there, FP8 as a `BlockScaled`.

    Returns:
        A new array where experts are grouped or weights dequantised; else the caller's own.
    """
    return _combine(entry, [[_matrix(entry, tensors, key) for key in keys] for keys in entry.keys], dtype)


def native_leaf(entry: Entry, stored: Mapping[str, Array]) -> Leaf:
    """One native leaf of the caller's own stored native tensors: a `BlockScaled` where scales stand by."""
    scale_inv = stored.get(entry.native + SCALE_SUFFIX)
    if scale_inv is None:
        return stored[entry.native]
    block, parts = native_blocks(entry)
    return BlockScaled(values=stored[entry.native], scale_inv=scale_inv, block=block, parts=parts)


def native_blocks(entry: Entry) -> tuple[tuple[int, int], int]:
    """`block` and `parts` of an entry's native `BlockScaled`: grouped weights are transposed."""
    return (entry.block[::-1], entry.parts) if entry.row.grouped else (entry.block, 1)


def stored(key: str, leaf: Leaf) -> dict[str, Array]:
    """The arrays that a leaf is stored as, by name: a `BlockScaled` is its codes, then its scales."""
    if isinstance(leaf, BlockScaled):
        return {key: leaf.values, key + SCALE_SUFFIX: leaf.scale_inv}
    return {key: leaf}


def emit(entry: Entry, leaf: Leaf, dtype: DTypeLike | None, *, source: Array | None = None) -> dict[str, Array]:
    """The Hugging Face tensors of one native leaf, expert by expert; FP8 weights before their scales.

    Args:
        entry: which leaf.
        leaf: the native leaf.
        dtype: what block-scaled weights become (float8_e4m3fn, a float dtype, None for what is there); others are kept.
        source: grouped source scales; a weight that they reproduce exactly keeps them, any other is scaled by amax.

    Returns:
        New arrays where experts are taken apart or weights brought to another dtype; else the caller's own.

    Raises:
        NumericError: a weight to be quantised holds NaN or infinity (under a trace its scales are NaN instead).
    """
    tensors = emit_unchecked(entry, leaf, dtype, source=source)
    raise_if(poisoned(entry, leaf, tensors), NumericError)
    return tensors


def emit_unchecked(
    entry: Entry, leaf: Leaf, dtype: DTypeLike | None, *, source: Array | None = None
) -> dict[str, Array]:
    """As `emit`, but a weight that holds NaN or infinity has NaN scales, which `poisoned` finds."""
    dtype = dtype if entry.row.scaled else None
    matrices: Experts
    if entry.row.grouped:
        matrices = split(leaf, entry.parts, dtype, block=entry.block, source=source)
    else:
        matrices = [(encode(leaf, dtype, block=entry.block, source=source),)]
    return dict(_named(entry, matrices))


def recast(entry: Entry, leaf: Leaf, dtype: DTypeLike, *, source: Array | None = None) -> dict[str, Array]:
    """The stored native tensors of one native leaf, its weights brought to `dtype`; all else as in `emit`."""
    if not entry.row.scaled:
        return stored(entry.native, leaf)
    block, parts = native_blocks(entry)
    tensors = stored(entry.native, encode(leaf, dtype, block=block, parts=parts, source=source))
    raise_if(poisoned(entry, leaf, tensors), NumericError)
    return tensors


def arranged(entry: Entry, tensors: Mapping[str, Array], layout: str, *, rows: int | None = None) -> dict[str, Array]:
    """Stored native tensors of one leaf as a further layout has them: for a stack of layers, what is this layer's.

    Args:
        entry: which leaf, or some experts of it.
        tensors: by native name, scales included.
        layout: one of `layout.forms.FURTHER`.
        rows: so many leading rows of a tensor that does not group; None for all.

    Returns:
        By the layout's names: copies, or views of numpy arrays.
    """
    found: dict[str, Array] = {}
    for key, array in tensors.items():
        scales = key != entry.native
        place = arrange(entry, layout, rows=rows, scales=scales)
        pieces = axes.rearrange(array, **_axes(place), shape=place.shape)
        found |= {name + SCALE_SUFFIX * scales: piece for name, piece in zip(place.names, pieces, strict=True)}
    return found


def restored(entry: Entry, tensors: Mapping[str, Array], layout: str, *, rows: int | None = None) -> dict[str, Array]:
    """The inverse of `arranged`: stored native tensors; scales where there are any."""
    found: dict[str, Array] = {}
    for scales in (False, True):
        place = arrange(entry, layout, rows=rows, scales=scales) if not scales or entry.row.scaled else None
        names = [] if place is None else [name + SCALE_SUFFIX * scales for name in place.names]
        if place is None or names[0] not in tensors:
            continue
        whole = entry.grid if scales else (entry.shape if rows is None else (rows, *entry.shape[1:]))
        native = axes.restore([tensors[name] for name in names], **_axes(place), shape=whole)
        found[entry.native + SCALE_SUFFIX * scales] = native
    return found


class _Axes(TypedDict):
    split: tuple[int, ...]
    order: tuple[int, ...]
    apart: bool


def _axes(place: Arrangement) -> _Axes:
    return {"split": place.split, "order": place.order, "apart": place.apart}


def poisoned(entry: Entry, leaf: Leaf, tensors: Mapping[str, Array]) -> Iterator[Problem]:
    """A problem for each weight among `tensors`, made of `leaf`, whose new scales are NaN; none under a trace."""
    if isinstance(leaf, BlockScaled):
        return  # not quantised here: its scales are passed on as they are
    for key, scale_inv in tensors.items():
        if not key.endswith(SCALE_SUFFIX) or isinstance(scale_inv, jax.core.Tracer):
            continue
        bad = np.argwhere(~np.isfinite(np.asarray(scale_inv)))
        if len(bad):
            yield Problem(
                what="NaN or infinity in a weight to be quantised",
                key=key.removesuffix(SCALE_SUFFIX),
                got=f"{len(bad)} such blocks, the first at {bad[0].tolist()} of the grid of scales",
                remedy="repair the weight, or export without quantization",
            )


def group_scales(entry: Entry, tensors: Mapping[str, Array]) -> Array:
    """The native block scales of one entry, from the `_scale_inv` tensors of its Hugging Face form.

    Returns:
        float32, shaped as `entry.grid`: a new array where experts are grouped, else the caller's own.
    """
    if not entry.row.grouped:
        return tensors[entry.keys[0][0] + SCALE_SUFFIX]
    return cast(Array, assemble([[tensors[key + SCALE_SUFFIX] for key in keys] for keys in entry.keys], None))


def scale_problems(scales: Mapping[str, Array], entries: Iterable[Entry]) -> Iterator[Problem]:
    """A problem for each of `scales`, by native scale name, that is not the grid of block scales of an entry."""
    grids = {entry.native + SCALE_SUFFIX: entry.grid for entry in entries if entry.row.scaled}
    for key, array in scales.items():
        expected = None if key not in grids else f"float32 {list(grids[key])}"
        got = f"{array.dtype} {list(array.shape)}" if hasattr(array, "shape") else type(array).__name__
        if got != expected:
            yield Problem(what="not the source scales of a native tensor", key=key, expected=expected, got=got)


def scales_by_key(entry: Entry, scale_inv: Array) -> dict[str, Array]:
    """Native block scales of one entry, taken apart: by the Hugging Face name of the weight that each belongs to."""
    if not entry.row.grouped:
        return {entry.keys[0][0]: scale_inv}
    return dict(_named(entry, split(scale_inv, entry.parts, block=entry.block)))


def _matrix(entry: Entry, tensors: Mapping[str, Array], key: str) -> Leaf:
    if tensors[key].dtype != FP8:
        return tensors[key]
    return BlockScaled(values=tensors[key], scale_inv=tensors[key + SCALE_SUFFIX], block=entry.block)


def _combine(entry: Entry, matrices: Experts, dtype: DTypeLike | None) -> Leaf:
    if entry.row.grouped:
        return assemble(matrices, dtype)
    ((matrix,),) = matrices
    return encode(matrix, dtype, block=entry.block) if isinstance(matrix, BlockScaled) else matrix


def _named(entry: Entry, matrices: Experts) -> Iterator[tuple[str, Array]]:
    for keys, parts in zip(entry.keys, matrices, strict=True):
        for key, part in zip(keys, parts, strict=True):
            yield from stored(key, part).items()
