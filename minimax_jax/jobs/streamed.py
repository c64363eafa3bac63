"""Targets that other packages add: native checkpoints in files that are not safetensors."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from minimax_jax.errors import JobError, Problem

GROUP = "minimax_jax.targets"
"""Entry points of this group are functions that write a checkpoint in another form. Each is called with an opened
source and the destination, and by keyword with what `convert` got: dtype (by format name), max_memory_bytes, workers,
progress; it returns a Report."""


_OWN = {"orbax": "write", "maxtext": "write_maxtext", "maxtext-unscanned": "write_maxtext_unscanned"}
"""Those of this package, by name: functions of one module, which takes an extra."""


def streamed_targets() -> Mapping[str, EntryPoint]:
    """The further targets, and what installed packages offer, by name; none of them is imported for it."""
    own = {name: EntryPoint(name, f"minimax_jax.jobs.orbax:{function}", GROUP) for name, function in _OWN.items()}
    return {**{point.name: point for point in entry_points(group=GROUP)}, **own}


def load_target(name: str) -> Any:
    """The function that writes a further target.

    Raises:
        JobError: something is not installed that it takes.
    """
    try:
        return streamed_targets()[name].load()
    except ImportError as error:
        remedy = f"pip install 'minimax_jax[{error.name}]'" if error.name == "torch" else "install what is named here"
        what = f"something is not installed that the target {name} takes"
        raise JobError(Problem(what=what, got=str(error), remedy=remedy)) from error
