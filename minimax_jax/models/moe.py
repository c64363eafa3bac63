"""Mixture of experts: a float32 router with sigmoid scores, and experts in the native grouped layout as it is.

Where the weights of the experts lie apart on a mesh, every device computes what its own experts add to all tokens, and
the sums are added up over devices: activations travel, weights do not.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from minimax_jax.layout.config import MiniMaxConfig
from minimax_jax.models.contract import Slice, Weight, contract, take
from minimax_jax.models.parts import Fixed, Leaves, trained

_PICK_BELOW = 4
"""Choices are picked one by one if there are this many times more experts.

For a v5e the compiler estimates equal times at 1; the margin is for accelerators that launch each step from the host.
"""


@dataclass(frozen=True, kw_only=True)
class Spread:
    """Where experts lie.

    Attributes:
        mesh: the mesh of their devices.
        axes: its axes that the experts are divided over.
    """

    mesh: Mesh | AbstractMesh
    axes: tuple[str, ...]


class Router(nnx.Module):
    """Chooses the experts of each token; weight [expert, hidden], and a bias [expert] for the choice alone."""

    def __init__(self, leaves: Leaves, config: MiniMaxConfig):
        self.weight = trained(leaves["weight"])
        self.e_score_correction_bias = Fixed(leaves["e_score_correction_bias"])
        self.chosen = config.num_experts_per_tok

    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Experts of the tokens [tokens, hidden] and their shares; see `route`."""
        return route(x, self.weight.get_value(), self.e_score_correction_bias.get_value(), self.chosen)


class Experts(nnx.Module):
    """The weights of all experts: gate_and_up_projs [expert, hidden, 2*inter], down_projs [expert, inter, hidden].

    They run where they lie: if both are given as arrays (or shapes with a sharding) whose experts are divided over
    the same axes of a mesh, then over those axes, as `mix_spread` does it.
    """

    def __init__(self, leaves: Leaves):
        self.gate_and_up_projs = trained(leaves["gate_and_up_projs"])
        self.down_projs = trained(leaves["down_projs"])
        spread = spread_of(leaves["gate_and_up_projs"])
        self.spread = spread if spread == spread_of(leaves["down_projs"]) else None

    def __call__(self, x: jax.Array, chosen: jax.Array, shares: jax.Array) -> jax.Array:
        """See `mix`."""
        weights = self.gate_and_up_projs.get_value(), self.down_projs.get_value()
        if self.spread is None:
            return mix(x, chosen, shares, *weights)
        return mix_spread(x, chosen, shares, *weights, spread=self.spread)


class MoE(nnx.Module):
    """Router and experts of one layer."""

    def __init__(self, leaves: Leaves, config: MiniMaxConfig):
        self.gate = Router(leaves["gate"], config)
        self.experts = Experts(leaves["experts"])

    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """[batch, time, hidden] to the same, and the experts that were chosen: int32 [batch, time, chosen]."""
        tokens = x.reshape(-1, x.shape[-1])
        chosen, shares = self.gate(tokens)
        mixed = self.experts(tokens, chosen, shares)
        return mixed.reshape(x.shape), chosen.reshape(*x.shape[:2], -1)


def route(x: jax.Array, weight: jax.Array, bias: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    """The `k` experts of each token with the highest `sigmoid(x weight^T) + bias`, and their shares.

    Shares are the sigmoids alone, divided by their sum. All of it is in float32, on hardware whose products are
    coarser by default too: an error of a bfloat16 here changes which experts are chosen.

    Args:
        x: [tokens, hidden].
        weight: [expert, hidden].
        bias: [expert].
        k: how many experts a token has.

    Returns:
        Expert indices, int32 [tokens, k], and shares, float32 [tokens, k].
    """
    wide, weight, bias = (array.astype(jnp.float32) for array in (x, weight, bias))
    scores = jax.nn.sigmoid(jnp.einsum("th,eh->te", wide, weight, precision=lax.Precision.HIGHEST))
    _, chosen = lax.top_k(scores + bias[None], k)
    shares = jnp.take_along_axis(scores, chosen, axis=1)
    return chosen, shares / shares.sum(axis=1, keepdims=True)


def spread_of(weight: Any) -> Spread | None:
    """Where the experts of a weight [..., expert, rows, cols] lie; None if all of them lie on every device."""
    values = getattr(weight, "values", weight)
    sharding = None if isinstance(values, jax.core.Tracer) else getattr(values, "sharding", None)
    if not isinstance(sharding, NamedSharding):
        return None
    axes = (*sharding.spec, *(None for _ in values.shape))[len(values.shape) - 3]
    axes = axes if isinstance(axes, tuple) else () if axes is None else (axes,)
    divided = math.prod(sharding.mesh.shape[axis] for axis in axes) > 1
    return Spread(mesh=sharding.mesh, axes=axes) if divided else None


def mix(
    x: jax.Array, chosen: jax.Array, shares: jax.Array, gate_and_up: Weight, down: Weight, *, first: int | jax.Array = 0
) -> jax.Array:
    """Sum of the chosen experts' outputs `(silu(x gate) * (x up)) down`, each times its share.

    With few tokens, as in decoding, the weights of each chosen expert are picked out, and the others are not read;
    otherwise tokens are sorted by expert and multiplied group by group.

    Args:
        x: [tokens, hidden].
        chosen: int32 [tokens, k].
        shares: float32 [tokens, k].
        gate_and_up: [expert, hidden, 2*inter], gate first.
        down: [expert, inter, hidden].
        first: index of the first expert in these weights. Choices outside of them add nothing, so that the results
            of a device's own experts can be summed over devices.

    Returns:
        [tokens, hidden], in the dtype of `x`; the sum is in float32.
    """
    return _mix(x, chosen, shares, gate_and_up, down, first).astype(x.dtype)


def mix_spread(
    x: jax.Array, chosen: jax.Array, shares: jax.Array, gate_and_up: Weight, down: Weight, *, spread: Spread
) -> jax.Array:
    """As `mix`, on the devices where the experts lie; one sum over devices, float32 [tokens, hidden], is all traffic.

    Args:
        x: [tokens, hidden]; all tokens go to every device.
        chosen: int32 [tokens, k].
        shares: float32 [tokens, k].
        gate_and_up: [expert, hidden, 2*inter], divided over the axes of `spread`.
        down: [expert, inter, hidden], divided alike.
        spread: the mesh, of automatic axes, and which of them.

    Returns:
        [tokens, hidden], in the dtype of `x`; the sum is in float32.
    """

    def own(x: jax.Array, chosen: jax.Array, shares: jax.Array, gate_and_up: Weight, down: Weight) -> jax.Array:
        # Not left to be done where it is needed: rows gathered from `x` would not be summed up in its gradient.
        x, chosen, shares = lax.pcast((x, chosen, shares), spread.axes, to="varying")
        first = lax.axis_index(spread.axes) * down.shape[0]
        mixed = _mix(x, chosen, shares, gate_and_up, down, first, skip=True)
        total: jax.Array = lax.psum(mixed, spread.axes)  # type: ignore[no-untyped-call]
        return total

    everywhere = _spec()
    weights = (_partition(weight, spread.axes) for weight in (gate_and_up, down))
    run = jax.shard_map(
        own,
        mesh=spread.mesh,
        in_specs=(everywhere, everywhere, everywhere, *weights),
        out_specs=everywhere,
        axis_names=set(spread.axes),
    )
    return run(x, chosen, shares, gate_and_up, down).astype(x.dtype)


def _partition(weight: Weight, axes: tuple[str, ...]) -> Any:
    """A tree of `PartitionSpec`s for a weight [expert, rows, cols], or for a slice of more."""
    if isinstance(weight, Slice):
        index = jax.tree.map(lambda _: _spec(), weight.index)
        return Slice(whole=_partition(weight.whole, axes), index=index)
    return jax.tree.map(lambda leaf: _spec(*(None,) * (leaf.ndim - 3), axes), weight)


def _spec(*axes: tuple[str, ...] | None) -> PartitionSpec:
    return PartitionSpec(*axes)  # type: ignore[no-untyped-call]


def _mix(
    x: jax.Array,
    chosen: jax.Array,
    shares: jax.Array,
    gate_and_up: Weight,
    down: Weight,
    first: int | jax.Array,
    *,
    skip: bool = False,
) -> jax.Array:
    """`mix` before its result is rounded: float32 [tokens, hidden]. `skip` as for `_picked`."""
    experts = down.shape[0]
    local = chosen.reshape(-1) - first
    local = jnp.where((local >= 0) & (local < experts), local, experts)
    few = local.size * _PICK_BELOW <= experts
    out = _picked(x, local, gate_and_up, down, skip=skip) if few else _grouped(x, local, gate_and_up, down)
    out = jnp.where((local < experts)[:, None], out.astype(jnp.float32), 0).reshape(*chosen.shape, -1)
    return (out * shares[:, :, None]).sum(axis=1)  # not a dot: that may round float32 to bfloat16


def _picked(x: jax.Array, local: jax.Array, gate_and_up: Weight, down: Weight, *, skip: bool) -> jax.Array:
    """One choice after the other: only the weights that it needs are read, and one expert's at most are dequantised.

    With `skip`, none are read for experts that are elsewhere.
    """
    experts = down.shape[0]

    def run(row: jax.Array, expert: jax.Array) -> jax.Array:
        inner = _gated(contract(jnp.matmul, row, take(gate_and_up, expert.clip(max=experts - 1))))
        return contract(jnp.matmul, inner, take(down, expert.clip(max=experts - 1)))

    def one(choice: tuple[jax.Array, jax.Array]) -> jax.Array:
        if not skip:
            return run(*choice)
        result: jax.Array = lax.cond(choice[1] < experts, run, lambda row, _: jnp.zeros_like(row), *choice)
        return result

    out: jax.Array = lax.map(one, (jnp.repeat(x, local.size // x.shape[0], axis=0), local))
    return out


def _grouped(x: jax.Array, local: jax.Array, gate_and_up: Weight, down: Weight) -> jax.Array:
    """Rows sorted by expert, and back into the order of the choices; those of no expert here come last."""
    order = jnp.argsort(local)
    rows = x[order // (local.size // x.shape[0])]
    sizes = jnp.bincount(local, length=down.shape[0]).astype(jnp.int32)

    def times(x: jax.Array, weight: Weight) -> jax.Array:
        return contract(lambda x, w: lax.ragged_dot(x, w, sizes), x, weight)

    out = times(_gated(times(rows, gate_and_up)), down)
    return out[jnp.argsort(order)]


def _gated(gate_and_up: jax.Array) -> jax.Array:
    gate, up = jnp.split(gate_and_up, 2, axis=-1)
    return jax.nn.silu(gate) * up
