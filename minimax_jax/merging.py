"""LoRA added to base weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import jax
import numpy as np

from minimax_jax.dtypes import FLOATS, NAMES
from minimax_jax.errors import LayoutError, NumericError, Problem, raise_if
from minimax_jax.layout.config import MiniMaxConfig
from minimax_jax.layout.lora import SIDES, Side, adapted
from minimax_jax.layout.specs import Entry, Specs, specs
from minimax_jax.layout.table import PEFT_PREFIX, PREFIX
from minimax_jax.leaves import Leaf
from minimax_jax.ops.checks import Array
from minimax_jax.ops.lora import add_product
from minimax_jax.ops.scaled import BlockScaled


def merge_lora(
    native: Mapping[str, Leaf], lora: Mapping[str, Array], config: MiniMaxConfig, *, scaling: float
) -> dict[str, Leaf]:
    """Add a LoRA adapter to the weights it adapts: `weight + scaling * B @ A`.

    The product and the sum are float32 and rounded once, to the weight's dtype. (PEFT rounds the product first: merged
    weights agree within 5e-7 of the largest in float32, 8e-3 in bfloat16.) A `BlockScaled` weight stays one: an
    expert's matrix that did not change keeps its codes and scales, any other is quantised with scales by amax.

    Args:
        native: a native tree, or the part of it that is adapted. Not changed.
        lora: grouped expert LoRA (see `group_lora` and `from_param_wrapper`), and the LoRA of projections, of the
            router and of the output head as PEFT stores it (`...q_proj.lora_A.weight`). Names may have PEFT's prefix
            in front, or `model.`, or nothing.
        config: the config of the native tree.
        scaling: `alpha / rank`, or `alpha / sqrt(rank)` for rank-stabilised LoRA. The rank is the adapter's own, not
            the doubled one of `group_lora(..., concatenate=True)`.

    Returns:
        A new dict; adapted weights are new arrays, others the caller's own.

    Raises:
        LayoutError: LoRA that nothing in `native` is there for, an A without its B, wrong shapes or dtypes.
        NumericError: a merged weight that is to stay FP8 is not finite (under a trace its scales are NaN instead).
    """
    table = specs(config, PREFIX if any(key.startswith(PREFIX) for key in native) else "")
    pairs: dict[str, dict[Side, str]] = {}
    problems = list(_pair(pairs, native, lora, table))
    for name, pair in pairs.items():
        problems += _problems(table.by_native[name], native[name], pair, lora)
    raise_if(problems, LayoutError)
    merged = {
        name: _merge(table.by_native[name], native[name], lora[pair["A"]], lora[pair["B"]], scaling)
        for name, pair in pairs.items()
    }
    raise_if(_not_finite(merged), NumericError)
    return dict(native) | merged


def _pair(
    pairs: dict[str, dict[Side, str]], native: Mapping[str, Leaf], lora: Mapping[str, Array], table: Specs
) -> Iterator[Problem]:
    """Fill `pairs`: for each adapted native name, the names of its A and B; yield what does not fit in."""
    known = adapted(table.config)
    for key in lora:
        found = known.get(key.removeprefix(PEFT_PREFIX).removeprefix(PREFIX))
        name = None if found is None else table.entries[found.entry].native
        if found is None or name is None or name not in native:
            remedy = "LoRA of experts must be grouped first: group_lora, from_param_wrapper"
            yield Problem(what="LoRA of nothing that is there", key=key, got=name, remedy=remedy)
            continue
        pair = pairs.setdefault(name, {})
        if found.side in pair:
            yield Problem(what="given twice", key=key, got=f"{pair[found.side]} as well")
        pair[found.side] = key


def _problems(entry: Entry, weight: Leaf, pair: Mapping[Side, str], lora: Mapping[str, Array]) -> Iterator[Problem]:
    """What keeps a pair of factors from being those of a weight."""
    if weight.shape != entry.shape or not (isinstance(weight, BlockScaled) or NAMES.get(weight.dtype) in FLOATS):
        expected = f"a float dtype or BlockScaled, {list(entry.shape)}"
        yield Problem(
            what="wrong weight", key=entry.native, expected=expected, got=f"{weight.dtype} {list(weight.shape)}"
        )
    if len(pair) < 2:
        yield Problem(what="A without its B, or B without its A", key=next(iter(pair.values())))
        return
    *experts, first, last = entry.shape
    rank = lora[pair["B"]].shape[-2 if entry.row.grouped else -1]
    left, right = (*experts, first, rank), (*experts, rank, last)
    shapes = (left, right) if entry.row.grouped else (right, left)
    for side, shape in zip(SIDES, shapes, strict=True):
        factor = lora[pair[side]]
        if factor.shape != shape or NAMES.get(factor.dtype) not in FLOATS:
            got = f"{factor.dtype} {list(factor.shape)}"
            yield Problem(what="wrong factor", key=pair[side], expected=f"a float dtype, {list(shape)}", got=got)


def _merge(entry: Entry, weight: Leaf, a: Array, b: Array, scaling: float) -> Leaf:
    merged: Leaf
    if entry.row.grouped:
        merged = add_product(weight, a, b, scaling)
    else:  # PEFT's own order: [rows, cols] is B @ A
        alone = jax.tree.map(lambda leaf: leaf[None], weight)
        merged = add_product(alone, b[None], a[None], scaling)
        merged = jax.tree.map(lambda leaf: leaf[0], merged)
    return merged


def _not_finite(merged: Mapping[str, Leaf]) -> Iterator[Problem]:
    for name, leaf in merged.items():
        if not isinstance(leaf, BlockScaled) or isinstance(leaf.scale_inv, jax.core.Tracer):
            continue
        if not np.isfinite(np.asarray(leaf.scale_inv)).all():
            yield Problem(what="NaN or infinity in a merged weight that is to stay FP8", key=name)
