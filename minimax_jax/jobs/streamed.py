"""Targets that other packages add: native checkpoints in files that are not safetensors."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import EntryPoint, entry_points

GROUP = "minimax_jax.targets"
"""Entry points of this group are functions that write a checkpoint in another form. Each is called with an opened
source and the destination, and by keyword with what `convert` got: dtype (by format name), max_memory_bytes, workers,
progress; it returns a Report."""


def streamed_targets() -> Mapping[str, EntryPoint]:
    """The further targets that installed packages offer, by name; none of them is imported for it."""
    return {point.name: point for point in entry_points(group=GROUP)}
