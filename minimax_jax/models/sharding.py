"""Where on a mesh each weight goes: logical axes of the layout table -> mesh axes -> `NamedSharding`.

    mesh = jax.make_mesh((4, 2), ("expert", "fsdp"), axis_types=(AxisType.Auto,) * 2)
    shardings(config, mesh)  # by native name; what `jax.device_put`, `out_shardings` and `load` take

Every axis of a tensor is split evenly or not at all. The scales of a `BlockScaled` are split as its codes are where
every shard of the codes is whole blocks, so that a device holds the scales of its own codes; where blocks straddle
two shards the grid of scales, which is small, stays whole along that axis.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any, TypeAlias

import jax
from jax.sharding import NamedSharding, PartitionSpec

from minimax_jax.errors import JobError, Problem, raise_if
from minimax_jax.layout.config import MiniMaxConfig
from minimax_jax.layout.specs import Entry, specs
from minimax_jax.leaves import native_blocks
from minimax_jax.models.stack import stacked_entries
from minimax_jax.ops.scaled import BlockScaled

MeshAxes: TypeAlias = str | tuple[str, ...] | None
"""One mesh axis, several of them (the first varies slowest), or none."""

AXES = ("expert", "tensor", "fsdp")
"""The mesh axes that the default rules speak of; a mesh need not have all of them."""


@dataclass(frozen=True, kw_only=True)
class Rules:
    """Which mesh axes each logical axis is split over. Names are free; `AXES` that the mesh lacks are left out.

    By default whole experts are spread over `expert` and `tensor` together: the last axis of grouped gate and up holds
    all of gate, then all of up, so that splitting `inter` parts each gate from its up. What is small stays whole.

    Attributes:
        expert: experts.
        inter: inner size of an expert; that of gate and up counts twice.
        hidden: hidden size, in matrices.
        q_heads: query heads, in q_proj, o_proj and q_norm; whole heads.
        kv_heads: key and value heads, in k_proj, v_proj and k_norm; whole heads. Where there are more shards than
            heads, these tensors stay whole.
        vocab: tokens, in the embedding and the output head.
        router: experts, in the router, every row of which each token needs.
        norm: hidden size, in norms and the router.
    """

    expert: MeshAxes = ("expert", "tensor")
    inter: MeshAxes = None
    hidden: MeshAxes = "fsdp"
    q_heads: MeshAxes = "tensor"
    kv_heads: MeshAxes = "tensor"
    vocab: MeshAxes = "tensor"
    router: MeshAxes = None
    norm: MeshAxes = None

    def over(self, name: str, mesh_shape: Mapping[str, int]) -> tuple[str, ...]:
        """The mesh axes of one rule, without those of `AXES` that the mesh lacks."""
        axes = getattr(self, name)
        named = (axes,) if isinstance(axes, str) else axes or ()
        return tuple(axis for axis in named if axis in mesh_shape or axis not in AXES)


def shardings(
    config: MiniMaxConfig,
    mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh,
    *,
    rules: Rules | None = None,
    scaled: str = "BF16",
    stacked: bool = False,
) -> dict[str, Any]:
    """The sharding of every native tensor.

    Args:
        config: the checkpoint's config.
        mesh: devices, or an abstract mesh.
        rules: which mesh axes each logical axis is split over.
        scaled: dtype of block-scaled weights; F8_E4M3 gives `BlockScaled`s of two shardings.
        stacked: for a tree whose layers are stacked; the axis of layers is not split.

    Returns:
        `NamedSharding`s in the form of `abstract_weights(config, scaled=scaled, stacked=stacked)`.

    Raises:
        JobError: mesh axes that are unknown or used twice in one tensor, axes that do not divide; all of them.
    """
    placed = partition_specs(config, mesh.shape, rules=rules, scaled=scaled, stacked=stacked)
    return {name: _map(lambda own: NamedSharding(mesh, own), spec) for name, spec in placed.items()}


def partition_specs(
    config: MiniMaxConfig,
    mesh_shape: Mapping[str, int],
    *,
    rules: Rules | None = None,
    scaled: str = "BF16",
    stacked: bool = False,
) -> dict[str, Any]:
    """As `shardings`, but `PartitionSpec`s; of the mesh, only the sizes of its axes by name are asked for."""
    placer = Placer(config=config, mesh_shape=mesh_shape, rules=rules or Rules())
    groups = stacked_entries(config)
    problems = list(placer.unknown())
    problems += [problem for name, group in groups.items() for problem in placer.problems(name, group[0])]
    raise_if(problems, JobError)
    if stacked:
        return {
            name: placer.leaf(group[0], scaled, layers=(None,) if group[0].row.per_layer else ())
            for name, group in groups.items()
        }
    by_row = {group[0].row: placer.leaf(group[0], scaled) for group in groups.values()}
    return {entry.native: by_row[entry.row] for entry in specs(config).entries}


@dataclass(frozen=True, kw_only=True)
class Placer:
    """Applies rules to the tensors of one config."""

    config: MiniMaxConfig
    mesh_shape: Mapping[str, int]
    rules: Rules

    def leaf(self, entry: Entry, scaled: str, layers: tuple[None, ...] = ()) -> Any:
        """The `PartitionSpec` of a native tensor, or both of a `BlockScaled`; `layers` stands in front."""
        axes = self.axes(entry)
        values = _spec(*layers, *axes)
        if entry.dtype(scaled) != "F8_E4M3":
            return values
        scales = _spec(*layers, *self.scale_axes(entry, axes))
        return BlockScaled.tree_unflatten(native_blocks(entry), (values, scales))

    def axes(self, entry: Entry) -> list[tuple[str, ...] | None]:
        """Mesh axes of each axis of a native tensor."""
        over = (self.rules.over(name, self.mesh_shape) for name in _rule_names(entry))
        return [
            None if not mesh_axes or self.stays_whole(name, mesh_axes) else mesh_axes
            for name, mesh_axes in zip(_rule_names(entry), over, strict=True)
        ]

    def scale_axes(self, entry: Entry, axes: list[tuple[str, ...] | None]) -> list[tuple[str, ...] | None]:
        """Mesh axes of each axis of the grid of scales: the codes', where their shards are whole blocks."""
        block, parts = native_blocks(entry)
        *lead, rows, cols = entry.shape
        sizes = [(size, size, 1) for size in lead] + [(rows, rows, block[0]), (cols, cols // parts, block[1])]
        return [
            None if over is None or part % side or size // self.shards(over) % side else over
            for over, (size, part, side) in zip(axes, sizes, strict=True)
        ]

    def shards(self, mesh_axes: tuple[str, ...]) -> int:
        """How many shards some mesh axes make."""
        return math.prod(self.mesh_shape.get(axis, 1) for axis in mesh_axes)

    def heads(self, name: str) -> int | None:
        """How many heads a rule is about; None where it is about something else."""
        config = self.config
        return {"q_heads": config.num_attention_heads, "kv_heads": config.num_key_value_heads}.get(name)

    def stays_whole(self, name: str, mesh_axes: tuple[str, ...]) -> bool:
        """Whether there are fewer heads than shards, of those that may stay whole."""
        return name == "kv_heads" and self.shards(mesh_axes) > self.config.num_key_value_heads

    def unknown(self) -> Iterator[Problem]:
        """A problem for each rule that names mesh axes that the mesh lacks."""
        for name in (field.name for field in fields(Rules)):
            missing = [axis for axis in self.rules.over(name, self.mesh_shape) if axis not in self.mesh_shape]
            if missing:
                expected, got = f"of {', '.join(self.mesh_shape)}", ", ".join(missing)
                yield Problem(what=f"no such mesh axis, in the rule of {name}", expected=expected, got=got)

    def problems(self, name: str, entry: Entry) -> Iterator[Problem]:
        """What keeps one kind of tensor from being split."""
        known = [over and tuple(axis for axis in over if axis in self.mesh_shape) for over in self.axes(entry)]
        used = [axis for over in known for axis in over or ()]
        if twice := sorted({axis for axis in used if used.count(axis) > 1}):
            got = ", ".join(f"{rule} over {over}" for rule, over in zip(_rule_names(entry), known, strict=True) if over)
            remedy = "give one of these axes another mesh axis in Rules, or None"
            yield Problem(what=f"mesh axis used twice: {', '.join(twice)}", key=name, got=got, remedy=remedy)
        for rule, size, over in zip(_rule_names(entry), entry.shape, known, strict=True):
            if over:
                yield from self.uneven(name, rule, size, over)

    def uneven(self, name: str, rule: str, size: int, over: tuple[str, ...]) -> Iterator[Problem]:
        """The problem of an axis that does not divide."""
        shards, heads = self.shards(over), self.heads(rule)
        if (heads or size) % shards == 0:
            return
        what = f"axis {rule} does not divide over the mesh" + (": heads stay whole" if heads else "")
        expected = f"a multiple of {shards} ({' x '.join(f'{axis}={self.mesh_shape[axis]}' for axis in over)})"
        got = f"{heads} heads" if heads else f"size {size}"
        remedy = f"another mesh, or in Python Rules({rule}=...) with fewer mesh axes, or {rule}=None"
        yield Problem(what=what, key=name, expected=expected, got=got, remedy=remedy)


def _rule_names(entry: Entry) -> tuple[str, ...]:
    """The fields of `Rules` that the axes of a native tensor go by."""
    if entry.row.grouped:
        rows, cols = entry.row.axes
        return "expert", cols, rows
    if len(entry.shape) == 1 or "expert" in entry.row.axes:
        return tuple(_SMALL.get(axis, _FIELDS.get(axis, axis)) for axis in entry.row.axes)
    return tuple(_FIELDS.get(axis, axis) for axis in entry.row.axes)


_FIELDS = {"q_heads*head_dim": "q_heads", "kv_heads*head_dim": "kv_heads"}
_SMALL = {"expert": "router", "hidden": "norm"}
"""The fields of logical axes: of those that are not their own name, and of those in vectors and the router."""


def _spec(*axes: tuple[str, ...] | None) -> PartitionSpec:
    return PartitionSpec(*axes)  # type: ignore[no-untyped-call]


def _map(wrap: Callable[[PartitionSpec], Any], spec: Any) -> Any:
    """`wrap` over one `PartitionSpec`, or the two of a `BlockScaled`."""
    if not isinstance(spec, BlockScaled):
        return wrap(spec)
    leaves, static = spec.tree_flatten()
    return BlockScaled.tree_unflatten(static, [wrap(leaf) for leaf in leaves])
