"""Expert LoRA between its three forms: pure functions over flat trees, lossless in both directions.

A LoRA of rank r adds `scaling * B @ A` to a weight `[rows, cols]`, with A `[r, cols]` and B `[rows, r]`; `scaling` is
`alpha / r` (`alpha / sqrt(r)` where rank-stabilised). Names of its forms stand in `layout.table.LORA_ROWS`:

- per expert, as PEFT stores the LoRA of linear layers (NeMo AutoModel's `v4_compatible=True`), under the published
  module names or NeMo's;
- grouped, as NeMo AutoModel trains it: one A and one B for all experts, gate and up side by side;
- wrapped, as PEFT stores the LoRA of the fused parameters of transformers v5 (NeMo AutoModel's default).

What is not expert LoRA, or is of another form, passes through as the caller's own array; what stands in front of
`layers.` in a name stays there. Nothing is computed, so every bit stays. All of it works on numpy and JAX arrays, and
under `jax.jit`. `merge_lora` adds grouped LoRA to base weights.

**Two A's for gate and up.** The grouped form has one A for both, `[hidden, r]`, and B `[r, 2*inter]`. An adapter whose
gate and up have an A each, `Ag` and `Au`, fits in with both behind one another, at twice the rank:

    [Ag | Au] @ [[Bg, 0], [0, Bu]] = [Ag @ Bg | Au @ Bu]

with `[hidden, 2*r]` and `[2*r, 2*inter]`; PEFT fuses such adapters alike. That is what `concatenate=True` makes of
every adapter, and what `concatenated=True` takes apart again. Down, which has nothing to stand beside, is filled up
with zeros, since NeMo AutoModel's modules have one rank for all. The scaling does not change: whoever derives it from
the rank, as NeMo AutoModel and PEFT do, is to be given twice the rank and twice `alpha`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Literal, cast

import jax
import jax.numpy as jnp
import numpy as np

from minimax_jax.errors import LayoutError, Problem, raise_if
from minimax_jax.layout.config import MiniMaxConfig
from minimax_jax.layout.lora import Factor, Form, Found, Place, find, fits, problems
from minimax_jax.merging import merge_lora as merge_lora
from minimax_jax.ops.assemble import assemble, split
from minimax_jax.ops.checks import Array
from minimax_jax.ops.lora import fold_a, fold_b, gather_a, gather_b, spread_a, spread_b, unfold_a, unfold_b
from minimax_jax.ops.rounding import bits_of

Names = Literal["hub", "nemo"]

_BLOCKS = 2
"""Blocks of ranks of a concatenated adapter: one for the gate, one for up."""


def group_lora(
    tree: Mapping[str, Array], config: MiniMaxConfig, *, concatenate: bool = False, partial: bool = False
) -> dict[str, Array]:
    """Per-expert LoRA to grouped LoRA; the inverse of `ungroup_lora`.

    Args:
        tree: arrays by name; per-expert names may be the published modules' or NeMo's. Not changed.
        config: the config of the adapted checkpoint.
        concatenate: keep an A each for gate and up, at twice the rank; see the module. Otherwise they must be equal.
        partial: allow an A without its B, and the other way round.

    Returns:
        A new dict; grouped factors are new arrays, A `[experts, cols, rank]` and B `[experts, rank, rows]`.

    Raises:
        LayoutError: what is missing, unexpected, or of a wrong shape, rank or dtype; or A's of gate and up that differ
            (under a trace such experts' A is NaN instead).
    """
    found = find(tree, config, "split", partial=partial)
    raise_if(problems(found, tree, "split"), LayoutError)
    out, differing = _rest(found, tree), []
    for factor, places in found.factors.items():
        parts = [_grouped(tree, config, places, (part,)) for part in range(factor.parts)]
        if concatenate:
            spread = spread_a if factor.side == "A" else spread_b
            grouped = spread(jnp.concatenate(parts, axis=2), factor.parts, _BLOCKS)
        elif factor.side == "A":
            unequal = (bits_of(parts[0]) != bits_of(parts[-1])).any((1, 2))
            differing += [places[Place(expert, factor.parts - 1)] for expert in _known(unequal)]
            grouped = _poison(parts[0], unequal)
        else:
            grouped = jnp.concatenate(parts, axis=2)
        out[factor.key(factor.row.grouped)] = grouped
    raise_if(map(_two_as, differing), LayoutError)
    return out


def ungroup_lora(
    tree: Mapping[str, Array],
    config: MiniMaxConfig,
    *,
    names: Names = "hub",
    concatenated: bool = False,
    partial: bool = False,
) -> dict[str, Array]:
    """Grouped LoRA to per-expert LoRA; the inverse of `group_lora`.

    Args:
        tree: arrays by name. Not changed.
        config: the config of the adapted checkpoint.
        names: whose module names to write: the published ones, `block_sparse_moe.experts.0.w1`, or NeMo AutoModel's,
            `mlp.experts.0.gate_proj`.
        concatenated: take apart what `concatenate=True` made. Otherwise gate and up get the same A, of the full rank,
            which is right for every grouped LoRA.
        partial: as in `group_lora`.

    Returns:
        A new dict; per-expert factors are new arrays, A `[rank, cols]` and B `[rows, rank]`. Gate and up may share one.

    Raises:
        LayoutError: as from `group_lora`; with `concatenated`, an odd rank, or numbers where zeros should be, as after
            training (under a trace such experts' factor is NaN instead).
    """
    found = find(tree, config, "grouped", partial=partial)
    raise_if([*problems(found, tree, "grouped"), *(_odd_ranks(found, tree) if concatenated else ())], LayoutError)
    out, strays = _rest(found, tree), []
    for factor, places in found.factors.items():
        (key,), templates = places.values(), {"hub": factor.row.hub, "nemo": factor.row.nemo}[names]
        grouped = tree[key]
        if concatenated:
            gather = gather_a if factor.side == "A" else gather_b
            gathered, stray = gather(grouped, factor.parts, _BLOCKS)
            strays += [_stray(key, expert) for expert in _known(stray)]
            grouped = _poison(gathered, stray)
        shared = factor.side == "A" and not concatenated
        for expert, matrices in enumerate(split(grouped, 1 if shared else factor.parts, block=(1, 1))):
            for template, matrix in zip(templates, matrices * (factor.parts if shared else 1), strict=True):
                out[factor.key(template, expert)] = cast(jax.Array, matrix)
    raise_if(strays, LayoutError)
    return out


def to_param_wrapper(
    tree: Mapping[str, Array], config: MiniMaxConfig, *, legacy: bool = False, partial: bool = False
) -> dict[str, Array]:
    """Grouped LoRA to PEFT's ParamWrapper form; the inverse of `from_param_wrapper`.

    PEFT adapts the fused parameters `mlp.experts.gate_up_proj` and `down_proj` (`LoraConfig(target_parameters=...)`,
    with the rank of the grouped factors) and folds the experts into the rank, in A expert by expert, in B rank by rank.

    Args:
        tree: arrays by name. Not changed.
        config: the config of the adapted checkpoint.
        legacy: for PEFT 0.19.0 and older, which took these parameters for transposed: its A is the transposed B.
        partial: as in `group_lora`.

    Returns:
        A new dict; wrapped factors are new arrays, A `[experts*rank, cols]` and B `[rows, rank*experts]` (legacy:
        `[experts*rank, rows]` and `[cols, rank*experts]`).

    Raises:
        LayoutError: what is missing, unexpected, or of a wrong shape, rank or dtype.
    """
    found = find(tree, config, "grouped", partial=partial)
    raise_if(problems(found, tree, "grouped"), LayoutError)
    out = _rest(found, tree)
    for factor, places in found.factors.items():
        (key,) = places.values()
        turned, grouped = _transposed(factor, tree[key]) if legacy else (factor, tree[key])
        out[turned.key(turned.row.wrapped)] = fold_a(grouped) if turned.side == "A" else fold_b(grouped)
    return out


def from_param_wrapper(
    tree: Mapping[str, Array], config: MiniMaxConfig, *, legacy: bool | None = None, partial: bool = False
) -> dict[str, Array]:
    """PEFT's ParamWrapper form to grouped LoRA; the inverse of `to_param_wrapper`.

    Args:
        tree: arrays by name. Not changed.
        config: the config of the adapted checkpoint.
        legacy: whether PEFT 0.19.0 or older laid it out; None finds out from the shapes. They cannot tell where
            only gate and up are adapted and hidden equals 2*inter, as in the published models.
        partial: as in `group_lora`.

    Returns:
        A new dict; grouped factors are new arrays.

    Raises:
        LayoutError: as from `to_param_wrapper`, and where shapes cannot tell the layout.
    """
    found = find(tree, config, "wrapped", partial=partial)
    form: Form = "legacy" if _is_legacy(found, tree, legacy) else "wrapped"
    raise_if(problems(found, tree, form), LayoutError)
    out = _rest(found, tree)
    for factor, places in found.factors.items():
        (key,) = places.values()
        unfold = unfold_a if factor.side == "A" else unfold_b
        grouped = unfold(tree[key], experts=config.num_local_experts)
        turned, grouped = _transposed(factor, grouped) if form == "legacy" else (factor, grouped)
        out[turned.key(turned.row.grouped)] = grouped
    return out


def _rest(found: Found, tree: Mapping[str, Array]) -> dict[str, Array]:
    return {key: tree[key] for key in found.rest}


def _grouped(
    tree: Mapping[str, Array], config: MiniMaxConfig, places: Mapping[Place, str], parts: Sequence[int]
) -> jax.Array:
    experts = range(config.num_local_experts)
    matrices = [[tree[places[Place(expert, part)]] for part in parts] for expert in experts]
    return cast(jax.Array, assemble(matrices, None))


def _transposed(factor: Factor, grouped: Array) -> tuple[Factor, jax.Array]:
    """What the other side of the legacy form holds: (A B)' = B' A'."""
    return factor.other, jnp.swapaxes(grouped, 1, 2)


def _is_legacy(found: Found, tree: Mapping[str, Array], legacy: bool | None) -> bool:
    if legacy is not None or not found.factors:
        return bool(legacy)
    modern, old = fits(found, tree, "wrapped"), fits(found, tree, "legacy")
    if modern and old:
        key = next(iter(next(iter(found.factors.values())).values()))
        remedy = "say which PEFT wrote it: legacy=True for 0.19.0 and older, else legacy=False"
        raise LayoutError(Problem(what="shapes fit both layouts of PEFT's ParamWrapper", key=key, remedy=remedy))
    return old


def _odd_ranks(found: Found, tree: Mapping[str, Array]) -> Iterator[Problem]:
    for factor, places in found.factors.items():
        (key,) = places.values()
        rank = tree[key].shape[2 if factor.side == "A" else 1]
        if rank % _BLOCKS:
            yield Problem(what="not concatenated", key=key, expected="an even rank", got=str(rank))


def _stray(key: str, expert: int) -> Problem:
    remedy = "ungroup with concatenated=False, which gives gate and up the same A"
    return Problem(
        what="not block-diagonal", key=key, got=f"numbers off the diagonal of expert {expert}", remedy=remedy
    )


def _two_as(key: str) -> Problem:
    remedy = "group with concatenate=True, which keeps both at twice the rank"
    return Problem(what="A differs from that of the gate", key=key, expected="one A for gate and up", remedy=remedy)


def _known(bad: jax.Array) -> list[int]:
    """The experts that are bad; none under a trace."""
    return [] if isinstance(bad, jax.core.Tracer) else np.flatnonzero(bad).tolist()


def _poison(grouped: Array, bad: jax.Array) -> Array:
    """NaN for bad experts under a trace, where nothing can be raised."""
    if not isinstance(bad, jax.core.Tracer):
        return grouped
    return jnp.where(bad[:, None, None], jnp.array(jnp.nan, grouped.dtype), grouped)
