"""Targets by the name that users give them: what each writes, and what it can be asked for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from minimax_jax.errors import Problem, RequestError, argument, raise_if
from minimax_jax.io.shards import DEFAULT_SHARD_BYTES
from minimax_jax.jobs import streamed
from minimax_jax.jobs.plan import Target
from minimax_jax.layout.forms import HOLDING_FP8

TARGETS = {
    "native": Target(layout="native", dtype="BF16"),
    "hf": Target(layout="hf", dtype="BF16"),
    "hf-fp8": Target(layout="hf", dtype="F8_E4M3"),
    "transformers-v5": Target(layout="transformers-v5", dtype="BF16"),
}
"""Targets in safetensors by the name that users give them; `jobs.streamed` has the others."""

STORED: Mapping[str, Literal["BF16", "F32", "F8_E4M3"]] = {"bf16": "BF16", "f32": "F32", "fp8": "F8_E4M3"}
"""dtypes of block-scaled weights by the name that users give them."""


def target(to: str, dtype: str | None = None) -> Target:
    """The target of a name (`native`, `hf-fp8`, `orbax`, ...) and an optional dtype (`bf16`, `f32`, `fp8`).

    Raises:
        RequestError: there is no such target or dtype, or they contradict each other.
    """
    further = {
        name: Target(layout=streamed.streamed_layout(name), dtype="BF16") for name in streamed.streamed_targets()
    }
    chosen = (TARGETS | further).get(to)
    if chosen is None:
        expected = f"one of {', '.join([*TARGETS, *further])}"
        raise RequestError(Problem(what="no such target", expected=expected, got=to))
    if dtype is None:
        return chosen
    if dtype not in STORED:
        expected = f"one of {', '.join(STORED)}"
        raise RequestError(Problem(what="no such dtype of block-scaled weights", expected=expected, got=dtype))
    if to == "hf-fp8" and dtype != "fp8":
        remedy = argument("to", "hf")
        raise RequestError(Problem(what="target hf-fp8 stores FP8", expected="fp8", got=dtype, remedy=remedy))
    if dtype == "fp8" and chosen.layout not in HOLDING_FP8:
        raise RequestError(no_place_for_fp8(chosen.layout))
    return Target(layout=chosen.layout, dtype=STORED[dtype])


def require_known(
    to: str,
    *,
    shard_bytes: int = DEFAULT_SHARD_BYTES,
    check: str | None = None,
    restart: bool = False,
    distributed: bool = False,
    goes_on: bool = True,
) -> None:
    """Refuse what a target in other files than safetensors knows nothing of: it must not seem to be heeded.

    Args:
        to: the target.
        shard_bytes: as `convert` got it, and so are the next.
        check: means something to targets that go on after a stop, and so does `restart`.
        restart: see `check`.
        distributed: means nothing to any of them.
        goes_on: whether this one goes on after a stop.

    Raises:
        RequestError: what was given that means nothing to it.
    """
    asked = {"shard_bytes": shard_bytes != DEFAULT_SHARD_BYTES, "distributed": distributed}
    if not goes_on:
        asked |= {"check": check not in (None, "none"), "restart": restart}
    remedy = f"leave it out, or convert to a target in safetensors: {', '.join(TARGETS)}"
    raise_if(
        (
            Problem(what=f"{argument(name)} means nothing to the target {to}", remedy=remedy)
            for name, given in asked.items()
            if given
        ),
        RequestError,
    )


def why_uncertified(to: str) -> str | None:
    """Why a conversion leaves no certificate, in words; None where it can.

    Raises:
        JobError: something is not installed that the target takes.
    """
    if to in streamed.streamed_targets() and not streamed.certifies(streamed.load_target(to)):
        return f"the package that writes {to} makes none"
    return None


def require_certifiable(to: str, *, asked: str = "certify") -> None:
    """Refuse, before the long work, to certify what will have no certificate.

    Args:
        to: the target.
        asked: the argument that asks for it.

    Raises:
        RequestError: it cannot.
        JobError: as `why_uncertified`.
    """
    why = why_uncertified(to)
    if why is not None:
        raise RequestError(Problem(what=f"{argument(asked)} takes a certificate", got=why, remedy="leave it out"))


def no_place_for_fp8(layout: str) -> Problem:
    """The problem of FP8 weights for a layout that has no place for their scales."""
    what, remedy = f"{layout} has no place for FP8 weights", f"{argument('dtype', 'bf16')}, or f32"
    return Problem(what=what, expected="bf16 or f32", got="fp8", remedy=remedy)
