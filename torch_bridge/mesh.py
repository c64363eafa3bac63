"""DTensors in global coordinates: which rectangle of a tensor a rank holds, and what layout experts have on a mesh.

A rank's rectangle follows from mesh, placements and the global shape alone: along each mesh dimension a shard is one of
`torch.chunk`'s chunks. Everything that cuts a tensor asks `Layout.region`, so that block scales are found by global row
and column, wherever a shard begins.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

from minimax_jax.errors import LayoutError, Problem

Shape = Sequence[int]
Region = tuple[range, ...]
"""Of each axis, the indices that a rank holds."""

EP, EP_SHARD, EP_REPLICATE = "ep", "ep_shard", "ep_replicate"


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How a tensor lies on the ranks of a mesh."""

    mesh: DeviceMesh
    placements: tuple[Placement, ...]

    def __post_init__(self) -> None:
        for placement in self.placements:
            # By exact type: a strided shard, or a pending sum, is no plain rectangle.
            if type(placement) not in (Shard, Replicate):
                remedy = "redistribute it to Shard and Replicate placements"
                raise LayoutError(Problem(what="unsupported placement", got=str(placement), remedy=remedy))

    def region(self, shape: Shape) -> Region:
        """The rectangle of a tensor of global `shape` that this rank holds; empty ranges where it holds nothing.

        Raises:
            LayoutError: this rank is not in the mesh.
        """
        place = self.mesh.get_coordinate()
        if place is None:
            raise LayoutError(Problem(what="this rank is not in the mesh of the tensor", got=str(self.mesh)))
        return self.region_at(place, shape)

    def region_at(self, place: Sequence[int], shape: Shape) -> Region:
        """The rectangle of a tensor of global `shape` that the rank at `place` of the mesh holds."""
        region = [range(size) for size in shape]
        for placement, index, count in zip(self.placements, place, self.mesh.shape, strict=True):
            if isinstance(placement, Shard):
                region[placement.dim] = _chunk(region[placement.dim], index, count)
        return tuple(region)

    def holders(self, shape: Shape) -> Iterator[tuple[int, Region]]:
        """Ranks that together hold all of a tensor, each part once, and what they hold."""
        sharded = (
            range(n if isinstance(p, Shard) else 1) for p, n in zip(self.placements, self.mesh.shape, strict=True)
        )
        for place in itertools.product(*sharded):
            yield int(self.mesh.mesh[place]), self.region_at(place, shape)

    def wrap(self, local: torch.Tensor, shape: Shape) -> DTensor:
        """The DTensor of global `shape`, of which `local`, of the size of this rank's region, is a part.

        `local` is kept, on the device of the mesh.
        """
        if local.device.type != self.mesh.device_type and local.device.type != "meta":
            local = local.to(self.mesh.device_type)
        strides = tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))
        return DTensor.from_local(local, self.mesh, self.placements, shape=torch.Size(shape), stride=strides)


def layout_of(tensor: torch.Tensor) -> Layout | None:
    """The layout of a DTensor; None for a plain tensor."""
    if not isinstance(tensor, DTensor):
        return None
    return Layout(mesh=tensor.device_mesh, placements=tuple(tensor.placements))


def region_of(tensor: torch.Tensor) -> Region:
    """The rectangle that this rank holds: all of a plain tensor.

    Raises:
        LayoutError: a DTensor whose local part is not what its placements say.
    """
    layout = layout_of(tensor)
    if layout is None:
        return tuple(range(size) for size in tensor.shape)
    region = layout.region(tensor.shape)
    expected, got = [len(part) for part in region], list(local_of(tensor).shape)
    if expected != got:
        what = "the local part of a DTensor is not the chunk that its placements say"
        raise LayoutError(Problem(what=what, expected=f"shape {expected}", got=f"shape {got}"))
    return region


def local_of(tensor: torch.Tensor) -> torch.Tensor:
    """What this rank holds of a tensor; a view."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """All of a tensor on every rank; of a sharded DTensor a copy, by a collective of its mesh (for scales: small)."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def cut(tensor: torch.Tensor, region: Region) -> torch.Tensor:
    """The rectangle `region`, in global coordinates, out of what this rank holds of `tensor`; a view.

    Raises:
        LayoutError: this rank does not hold all of it.
    """
    held, local = region_of(tensor), local_of(tensor)
    for axis, (part, wanted) in enumerate(zip(held, region, strict=True)):
        if wanted and not (part and part[0] <= wanted[0] and wanted[-1] <= part[-1]):
            what = f"this rank does not hold the part of axis {axis} that it needs"
            remedy = "redistribute the tensor as its grouped form is to be, or replicate it"
            raise LayoutError(Problem(what=what, expected=_text(wanted), got=_text(part), remedy=remedy))
        start = wanted.start - part.start if wanted else 0
        local = local.narrow(axis, start, len(wanted))
    return local


def experts_layout(mesh: DeviceMesh) -> Layout | None:
    """How NeMo lays out a grouped tensor `[experts, hidden or inter, ...]` on a mesh of its expert dimensions.

    Experts are sharded over `ep`. Where `ep_shard` or `ep_replicate` has more than one rank, the second axis is
    sharded over the one and replicated over the other; else these dimensions are left out. None: nothing is left.

    Raises:
        LayoutError: a mesh with other dimensions, or without names.
    """
    names = mesh.mesh_dim_names or ()
    placements: dict[str, Placement] = {EP: Shard(0), EP_SHARD: Shard(1), EP_REPLICATE: Replicate()}
    if not names or not set(names) <= set(placements):
        expected = ", ".join(placements)
        raise LayoutError(Problem(what="not a mesh of experts", expected=f"dimensions of {expected}", got=str(names)))
    sizes = dict(zip(names, mesh.shape, strict=True))
    spread = any(sizes.get(name, 1) > 1 for name in (EP_SHARD, EP_REPLICATE))
    kept = tuple(name for name in names if name == EP or spread)
    return Layout(mesh=mesh[kept], placements=tuple(placements[name] for name in kept)) if kept else None


def matrix_layout(grouped: Layout, parts: int) -> Layout | None:
    """How the matrices of an expert, `[rows, cols]`, lie if their grouped tensor `[experts, cols, parts*rows]` does so.

    Mesh dimensions that shard experts are gone, and so is a replicated `ep`, as in NeMo. None: nothing is left, or
    nothing of more than one rank, and a rank's matrices are whole.

    Raises:
        LayoutError: several parts are sharded along the axis on which they lie side by side.
    """
    kept = [dim for dim, placement in enumerate(grouped.placements) if not _shards_experts(grouped, dim, placement)]
    if all(grouped.mesh.shape[dim] == 1 for dim in kept):
        return None
    placements = tuple(_transposed(grouped.placements[dim], parts) for dim in kept)
    return Layout(mesh=_submesh(grouped.mesh, kept), placements=placements)


def grouped_layout(matrix: Layout, parts: int) -> Layout:
    """The inverse of `matrix_layout` for a mesh without a dimension of experts.

    Raises:
        LayoutError: as `matrix_layout`.
    """
    back = {0: Shard(2), 1: Shard(1)}
    placements = tuple(back[p.dim] if isinstance(p, Shard) else p for p in matrix.placements)
    for placement in placements:
        _transposed(placement, parts)
    return Layout(mesh=matrix.mesh, placements=placements)


def _chunk(whole: range, index: int, count: int) -> range:
    size = -(-len(whole) // count)
    return whole[index * size : (index + 1) * size]


def _shards_experts(grouped: Layout, dim: int, placement: Placement) -> bool:
    names = grouped.mesh.mesh_dim_names
    return placement == Shard(0) or (isinstance(placement, Replicate) and names is not None and names[dim] == EP)


def _transposed(placement: Placement, parts: int) -> Placement:
    if not isinstance(placement, Shard):
        return placement
    if placement.dim == 2 and parts > 1:
        remedy = "redistribute it: shard experts or the second axis, or replicate"
        what = f"{parts} matrices side by side, sharded along that axis"
        raise LayoutError(Problem(what=what, got=str(placement), remedy=remedy))
    return Shard(2 - placement.dim)


def _submesh(mesh: DeviceMesh, dims: Sequence[int]) -> DeviceMesh:
    if len(dims) == mesh.ndim:
        return mesh
    if mesh.mesh_dim_names is None:
        remedy = "name the dimensions of the mesh"
        raise LayoutError(Problem(what="part of a mesh without names", got=str(mesh), remedy=remedy))
    return mesh[tuple(mesh.mesh_dim_names[dim] for dim in dims)]


def _text(part: range) -> str:
    return f"{part.start} to {part.stop}" if part else "nothing"
