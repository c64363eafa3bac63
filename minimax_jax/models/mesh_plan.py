"""What a mesh would hold of a checkpoint, from headers alone: bytes on each device, and what does not go well."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from minimax_jax.display import Displayed, counted
from minimax_jax.dtypes import DTYPES
from minimax_jax.errors import JobError, Problem
from minimax_jax.jobs.source import Source
from minimax_jax.layout.config import MiniMaxConfig
from minimax_jax.layout.specs import Entry, specs
from minimax_jax.models.boxes import Box
from minimax_jax.models.load_plan import plan_units
from minimax_jax.models.pieces import Goal, goals
from minimax_jax.models.sharding import AXES, Placer, Rules, partition_specs


@dataclass(frozen=True, kw_only=True)
class Share:
    """One kind of tensor on a mesh, all layers together.

    Attributes:
        kind: its native name, without the layer's number.
        axes: logical names of its axes.
        over: the mesh axes that each is split over.
        nbytes: bytes in all.
        device_bytes: bytes on one device.
    """

    kind: str
    axes: tuple[str, ...]
    over: tuple[tuple[str, ...], ...]
    nbytes: int
    device_bytes: int


@dataclass(frozen=True, kw_only=True, repr=False)
class MeshPlan(Displayed):
    """What loading a checkpoint onto a mesh would take.

    Attributes:
        mesh: sizes of the mesh axes by name.
        shares: kind by kind; empty where the checkpoint cannot be split so.
        read_bytes: what the process of one device reads; 0 where it cannot be split so.
        warnings: what does not go well, in words.
    """

    mesh: Mapping[str, int]
    shares: tuple[Share, ...]
    read_bytes: int
    warnings: tuple[str, ...]

    @property
    def loads(self) -> bool:
        """Whether the checkpoint can be loaded onto the mesh at all."""
        return bool(self.shares)

    @property
    def devices(self) -> int:
        """How many devices the mesh has."""
        return math.prod(self.mesh.values())

    @property
    def device_bytes(self) -> int:
        """Bytes of weights on one device."""
        return sum(share.device_bytes for share in self.shares)

    def views(self) -> Iterable[Any]:
        """What there is to look at."""
        from minimax_jax.models.mesh_report import view

        return view(self)


def mesh_plan(source: Source, mesh: Mapping[str, int], *, dtype: str = "BF16", rules: Rules | None = None) -> MeshPlan:
    """Plan the loading of a checkpoint onto a mesh, as `load` and `load_model` do it; no device is asked for.

    Args:
        source: an opened checkpoint.
        mesh: sizes of the mesh axes by name.
        dtype: what block-scaled weights become; `F8_E4M3` keeps them as they are stored.
        rules: which mesh axes each logical axis is split over.
    """
    chosen = rules or Rules()
    placer = Placer(config=source.config, mesh_shape=mesh, rules=chosen)
    warnings = list(_idle_axes(chosen, mesh))
    try:
        partition_specs(source.config, mesh, rules=chosen)
    except JobError as error:
        return MeshPlan(mesh=mesh, shares=(), read_bytes=0, warnings=(*warnings, *map(_in_a_line, error.problems)))
    held = _first_shards(source, mesh, chosen, dtype)
    warnings += _whole_heads(placer, source.config)
    warnings += _cut_blocks(placer, source)
    return MeshPlan(
        mesh=mesh,
        shares=tuple(_shares(placer, held)),
        read_bytes=sum(unit.read_bytes for unit in plan_units({goal: (box,) for goal, box in held.items()})),
        warnings=tuple(warnings),
    )


def _first_shards(source: Source, mesh: Mapping[str, int], rules: Rules, dtype: str) -> dict[Goal, Box]:
    """What the first device holds of every array; the others hold as much."""
    plain = partition_specs(source.config, mesh, rules=rules)
    fp8 = partition_specs(source.config, mesh, rules=rules, scaled="F8_E4M3")
    found: dict[Goal, Box] = {}
    for goal in goals(source, None if dtype == "F8_E4M3" else DTYPES[dtype]):
        leaf = plain[goal.name] if goal.role == "weights" else fp8[goal.name]
        own = leaf if goal.role == "weights" else leaf.values if goal.role == "codes" else leaf.scale_inv
        found[goal] = tuple((0, size // _shards(axes, mesh)) for size, axes in zip(goal.shape, own, strict=True))
    return found


def _shards(axes: Any, mesh: Mapping[str, int]) -> int:
    """How many shards one entry of a `PartitionSpec` makes."""
    named = (axes,) if isinstance(axes, str) else axes or ()
    return math.prod(mesh[axis] for axis in named)


def _shares(placer: Placer, held: Mapping[Goal, Box]) -> Iterator[Share]:
    by_kind: dict[str, list[tuple[Goal, Box]]] = {}
    for goal, box in held.items():
        by_kind.setdefault(goal.entry.row.native, []).append((goal, box))
    for kind, own in by_kind.items():
        entry = own[0][0].entry
        yield Share(
            kind=kind,
            axes=entry.row.native_axes,
            over=tuple(axes or () for axes in placer.axes(entry)),
            nbytes=sum(math.prod(goal.shape) * goal.dtype.itemsize for goal, _ in own),
            device_bytes=sum(math.prod(stop for _, stop in box) * goal.dtype.itemsize for goal, box in own),
        )


def _idle_axes(rules: Rules, mesh: Mapping[str, int]) -> Iterator[str]:
    """A warning for each mesh axis that nothing is split over."""
    used = {axis for name in Rules.__dataclass_fields__ for axis in rules.over(name, mesh)}
    for axis, size in mesh.items():
        if axis not in used and size > 1:
            yield f"nothing is split over {axis}={size}: the default rules know {', '.join(AXES)}"


def _whole_heads(placer: Placer, config: MiniMaxConfig) -> Iterator[str]:
    over = placer.rules.over("kv_heads", placer.mesh_shape)
    if over and placer.stays_whole("kv_heads", over):
        heads, shards = counted(config.num_key_value_heads, "KV head"), counted(placer.shards(over), "shard")
        count = f"{heads}, and {shards} of {' x '.join(over)}"
        yield f"what is split by KV heads stays whole on every device: there are {count}"


def _cut_blocks(placer: Placer, source: Source) -> Iterator[str]:
    """A warning for each kind of FP8 weight of which a shard is no whole number of blocks."""
    first = {entry.row: entry for entry in specs(source.config).entries}
    stored = {entry.row: source.survey.dtypes[entry.native] for entry in source.survey.entries}
    for row, entry in first.items():
        if stored[row] == "F8_E4M3":
            yield from _cuts(placer, entry)


def _cuts(placer: Placer, entry: Entry) -> Iterator[str]:
    axes = placer.axes(entry)
    for name, over, kept in zip(entry.row.native_axes, axes, placer.scale_axes(entry, axes), strict=True):
        if over and not kept:
            what = f"shards of {entry.row.native} along {name} cut blocks of {max(entry.block)}"
            yield f"{what}: the numbers are right, but block scales are read by more than one device"


def _in_a_line(problem: Problem) -> str:
    """What is wrong, and what to do about it."""
    details = (problem.key, f"got {problem.got}", f"expected {problem.expected}", problem.remedy)
    return f"{problem.what}: {'; '.join(detail for detail in details if detail)}"
