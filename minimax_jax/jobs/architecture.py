"""Whether two checkpoints are of one model: the same sizes, and the same numbers that change what it computes."""

from __future__ import annotations

import dataclasses
from typing import Any

from minimax_jax.errors import LayoutError, Problem, raise_if
from minimax_jax.jobs.source import Source

_IDLE_FIELDS = frozenset(("dtype", "weight_block_size", "modules_to_not_convert", "max_position_embeddings", "extra"))
"""Fields of a config that say how a checkpoint is stored, or nothing about what the model computes."""


def require_same_architecture(first: Source, second: Source) -> None:
    """Check that two checkpoints can be compared weight by weight.

    Raises:
        LayoutError: they cannot; all that differs.
    """
    configs = [_architecture(source) for source in (first, second)]
    what, file = "the two checkpoints are not of the same architecture", str(second.path)
    raise_if(
        (
            Problem(what=what, file=file, key=name, expected=str(ours), got=str(theirs))
            for (name, ours), theirs in zip(configs[0].items(), configs[1].values(), strict=True)
            if ours != theirs
        ),
        LayoutError,
    )


def _architecture(source: Source) -> dict[str, Any]:
    """What must be alike in two checkpoints, by name: their configs, and whether names begin with `model.`."""
    fields = dataclasses.fields(source.config)
    compared = {field.name: getattr(source.config, field.name) for field in fields if field.name not in _IDLE_FIELDS}
    return compared | {"name of the first tensor": next(source.survey.entries).native}
