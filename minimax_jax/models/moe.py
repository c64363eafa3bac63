"""Mixture of experts: a float32 router with sigmoid scores, and experts in the native grouped layout as it is."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from minimax_jax.layout.config import MiniMaxConfig
from minimax_jax.models.contract import Weight, contract, take
from minimax_jax.models.parts import Fixed, Leaves, trained

_PICK_BELOW = 4
"""Choices are picked one by one if there are this many times more experts.

For a v5e the compiler estimates equal times at 1; the margin is for accelerators that launch each step from the host.
"""


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
    """The weights of all experts: gate_and_up_projs [expert, hidden, 2*inter], down_projs [expert, inter, hidden]."""

    def __init__(self, leaves: Leaves):
        self.gate_and_up_projs = trained(leaves["gate_and_up_projs"])
        self.down_projs = trained(leaves["down_projs"])

    def __call__(self, x: jax.Array, chosen: jax.Array, shares: jax.Array) -> jax.Array:
        """See `mix`."""
        return mix(x, chosen, shares, self.gate_and_up_projs.get_value(), self.down_projs.get_value())


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
    experts = down.shape[0]
    local = chosen.reshape(-1) - first
    local = jnp.where((local >= 0) & (local < experts), local, experts)
    run = _picked if local.size * _PICK_BELOW <= experts else _grouped
    out = run(x, local, gate_and_up, down)
    out = jnp.where((local < experts)[:, None], out.astype(jnp.float32), 0).reshape(*chosen.shape, -1)
    return (out * shares[:, :, None]).sum(axis=1).astype(x.dtype)  # not a dot: that may round float32 to bfloat16


def _picked(x: jax.Array, local: jax.Array, gate_and_up: Weight, down: Weight) -> jax.Array:
    """One choice after the other: only the weights that it needs are read, and one expert's at most are dequantised."""

    def one(choice: tuple[jax.Array, jax.Array]) -> jax.Array:
        row, expert = choice
        inner = _gated(contract(jnp.matmul, row, take(gate_and_up, expert)))
        return contract(jnp.matmul, inner, take(down, expert))

    rows = jnp.repeat(x, local.size // x.shape[0], axis=0)
    out: jax.Array = lax.map(one, (rows, local.clip(max=down.shape[0] - 1)))
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
