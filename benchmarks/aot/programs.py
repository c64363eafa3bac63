"""The programs that are compiled: arguments as shapes on a mesh, and what a program of its kind must keep to."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from benchmarks.aot.targets import KINDS, Target, on, shape
from minimax_jax.layout.specs import specs
from minimax_jax.models import fill
from minimax_jax.ops.fp8 import FP8
from minimax_jax.ops.grouped import quantize_grouped
from minimax_jax.ops.scaled import BlockScaled, dequantize_grouped
from minimax_jax.synthetic.sizes import REAL


@dataclass(frozen=True, kw_only=True)
class Program:
    """One function, for one target.

    Attributes:
        name: for people.
        kind: `op`, `load`, `prefill` or `decode`: which limits hold.
        target: the chips.
        function: what is compiled.
        arguments: shapes on the target's mesh.
        donated: names of arguments whose memory is used again.
        out: shardings of the results; None leaves them to the compiler.
        least_bytes: what each chip must read and write at least; None if that is not known.
        loops: how often its loop runs.
        matrices: elements of an expert's gate and up, and of its down; empty where there are no experts.
        layer_bytes: of the gate and up of one layer's experts on one chip, in bfloat16.
    """

    name: str
    kind: str
    target: Target
    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    donated: tuple[str, ...] = ()
    out: Any = None
    least_bytes: int | None = None
    loops: int = 1
    matrices: frozenset[int] = frozenset()
    layer_bytes: int = 0


def operations(target: Target, experts: int = 256) -> Iterator[Program]:
    """The codec on one layer's `experts` at real shapes, spread over all chips of the target."""
    share = on(target.mesh(expert=target.chips), "expert")
    gate, down = (_matrices(share, experts, *size) for size in _sizes())
    grouped = _grouped(share, experts)
    weights = shape(grouped.shape, jnp.bfloat16, share)

    def by_amax(weights: jax.Array) -> Any:
        return [(part.values, part.scale_inv) for part in quantize_grouped(weights, 2)]

    def by_scales(weights: jax.Array, scale_inv: jax.Array) -> Any:
        return [part.values for part in quantize_grouped(weights, 2, scale_inv)]

    one_step = (
        ("dequantize + group gate and up", lambda *parts: dequantize_grouped(parts), (gate, gate)),
        ("dequantize + group down", lambda part: dequantize_grouped([part]), (down,)),
        ("ungroup + quantize by amax", by_amax, (weights,)),
        ("ungroup + quantize by given scales", by_scales, (weights, grouped.scale_inv)),
    )
    cases = [("dequantize gate and up", BlockScaled.dequantize, (grouped,)), *one_step]
    if target.chips > 1 and KINDS[target.kind].platform == "tpu":
        cases += [
            (f"{name}, each chip its own", _each(function, share), arguments) for name, function, arguments in one_step
        ]
    for name, function, arguments in cases:
        results = jax.eval_shape(function, *arguments)
        yield Program(
            name=f"{name}, {experts // target.chips} experts a chip",
            kind="op",
            target=target,
            function=function,
            arguments=arguments,
            out=jax.tree.map(lambda _: share, results),
            least_bytes=(_size(arguments) + _size(results)) // target.chips,
        )


def _each(function: Callable[..., Any], share: NamedSharding) -> Callable[..., Any]:
    """The function on every chip's share by itself; otherwise XLA divides a program, and the kernels are left out."""
    mapped: Callable[..., Any] = jax.shard_map(function, mesh=share.mesh, in_specs=share.spec, out_specs=share.spec)
    return mapped


def load_step(target: Target, experts: int = 32, at_once: int = 16) -> Iterator[Program]:
    """One step of a sharded load: some experts are dequantised, grouped and put into a shard, in place.

    Every device runs such programs of its own, on its own shard.
    """
    share = on(target.mesh(expert=1))
    gate, down = (_matrices(share, at_once, *size) for size in _sizes())
    for name, parts in (("gate and up", (gate, gate)), ("down", (down,))):
        recipe = fill.Recipe(
            dtype=np.dtype(jnp.bfloat16),
            grouped=True,
            block=(128, 128),
            offsets=((0, 0),) * len(parts),
            alike=True,
        )
        rows, cols = parts[0].shape[1:]
        shard = shape((experts, cols, len(parts) * rows), jnp.uint16, share)
        pieces = [(part.values, part.scale_inv) for part in parts]
        portion = at_once * cols * len(parts) * rows * 2
        yield Program(
            name=f"load {at_once} experts' {name} into a shard of {experts}",
            kind="load",
            target=target,
            function=partial(fill.put, recipe=recipe),
            arguments=(shard, pieces, (shape((), jnp.int32, share),)),
            donated=("shard",),
            least_bytes=_size(pieces) + portion,
        )


def _sizes() -> tuple[tuple[int, int], tuple[int, int]]:
    """Rows and columns of an expert's gate, and of its down."""
    experts = [entry for entry in specs(REAL).entries if entry.row.grouped][:2]
    sizes = [(entry.shape[2] // entry.parts, entry.shape[1]) for entry in experts]
    return sizes[0], sizes[1]


def _matrices(share: NamedSharding, experts: int, rows: int, cols: int) -> BlockScaled:
    return BlockScaled(
        values=shape((experts, rows, cols), FP8, share),  # type: ignore[arg-type]
        scale_inv=shape((experts, rows // 128, cols // 128), jnp.float32, share),  # type: ignore[arg-type]
    )


def _grouped(share: NamedSharding, experts: int) -> BlockScaled:
    inter, hidden = _sizes()[0]
    return BlockScaled(
        values=shape((experts, hidden, 2 * inter), FP8, share),  # type: ignore[arg-type]
        scale_inv=shape((experts, hidden // 128, 2 * inter // 128), jnp.float32, share),  # type: ignore[arg-type]
        parts=2,
    )


def _size(tree: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
