"""A checkpoint on a mesh, to look at and as plain values."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from minimax_jax.display import counted, size, table_of
from minimax_jax.jobs.report import warning
from minimax_jax.models.mesh_plan import MeshPlan, Share


def document(plan: MeshPlan) -> dict[str, Any]:
    """As plain values."""
    return {
        "axes": dict(plan.mesh),
        "devices": plan.devices,
        "device_bytes": plan.device_bytes,
        "read_bytes": plan.read_bytes,
        "by_kind": {
            share.kind: {
                "bytes": share.nbytes,
                "device_bytes": share.device_bytes,
                "axes": list(share.axes),
                "over": [list(axes) for axes in share.over],
            }
            for share in plan.shares
        },
        "warnings": list(plan.warnings),
    }


def view(plan: MeshPlan) -> Iterator[Any]:
    """To look at."""
    axes = ", ".join(f"{axis}={count}" for axis, count in plan.mesh.items())
    if plan.loads:
        held, read = size(plan.device_bytes), size(plan.read_bytes)
        devices = counted(plan.devices, "device")
        yield f"loaded onto a mesh of {axes}: {devices}, {held} on each, for which it reads {read}"
        table = table_of("kind", "split", "in all", "on a device")
        for share in plan.shares:
            table.add_row(share.kind, _split(share), size(share.nbytes), size(share.device_bytes))
        yield table
    else:
        yield f"it cannot be loaded onto a mesh of {axes}"
    yield from map(warning, plan.warnings)


def _split(share: Share) -> str:
    split = (f"{axis} over {' x '.join(over)}" for axis, over in zip(share.axes, share.over, strict=True) if over)
    return ", ".join(split) or "whole"
