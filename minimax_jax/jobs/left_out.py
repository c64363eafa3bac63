"""Tensors of a checkpoint that no job reads: which, how large, and on whose word. Every report says it."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from minimax_jax.display import counted
from minimax_jax.errors import LayoutError, Problem, raise_if
from minimax_jax.io.checkpoint import Checkpoint
from minimax_jax.io.header import TensorInfo
from minimax_jax.io.jsonfile import shown
from minimax_jax.layout.beside import left_out
from minimax_jax.layout.config import MiniMaxConfig
from minimax_jax.layout.specs import total_bytes


@dataclass(frozen=True, kw_only=True)
class LeftOut:
    """Tensors that were left out.

    Attributes:
        prefix: what their names begin with.
        announced: whether config.json announces them, as modules for multi-token prediction; else the caller named
            them.
        tensors: where they lie.
    """

    prefix: str
    announced: bool
    tensors: tuple[TensorInfo, ...]

    def __str__(self) -> str:
        why = "MTP modules, which config.json announces" if self.announced else "as asked"
        first, count = shown(self.keys[0]), len(self.keys)
        names = first if count == 1 else f"{first} to {shown(self.keys[-1])}"
        return f"left out, {why}: {counted(count, 'tensor')}, {self.nbytes:,} bytes: {names}"

    @property
    def keys(self) -> tuple[str, ...]:
        """Their names, in the order of the files."""
        return tuple(info.key for info in self.tensors)

    @property
    def nbytes(self) -> int:
        """Bytes of all of them."""
        return total_bytes(self.tensors)


def set_aside(
    checkpoint: Checkpoint, config: MiniMaxConfig, named: Collection[str]
) -> tuple[Checkpoint, tuple[LeftOut, ...]]:
    """A checkpoint without the tensors that are to be left out, and those.

    Args:
        checkpoint: all its tensors.
        config: its config.
        named: what the names of tensors to leave out begin with; see `layout.beside.left_out`.

    Raises:
        LayoutError: something named is the beginning of names of the model.
    """
    groups = left_out(checkpoint.tensors, config, named)
    asked = {name.rstrip(".") for name in named}
    aside = tuple(
        LeftOut(
            prefix=prefix,
            announced=prefix.rstrip(".") not in asked,
            tensors=tuple(checkpoint.tensors[key] for key in keys),
        )
        for prefix, keys in groups.items()
    )
    if not aside:
        return checkpoint, ()
    gone = {key for keys in groups.values() for key in keys}
    tensors = {key: info for key, info in checkpoint.tensors.items() if key not in gone}
    return dataclasses.replace(checkpoint, tensors=tensors), aside


def require_found(named: Iterable[str], left_out: Iterable[LeftOut]) -> None:
    """Check that each of the names to leave out was the beginning of something: one that is not is a slip of the pen.

    Args:
        named: what the names of tensors to leave out begin with.
        left_out: what was left out, of all checkpoints that were opened with `named`.

    Raises:
        LayoutError: some were the beginning of nothing.
    """
    keys = [f"{key}." for part in left_out for key in part.keys]
    raise_if(_found_nowhere(named, keys), LayoutError)


def _found_nowhere(named: Iterable[str], keys: Collection[str]) -> Iterator[Problem]:
    for name in named:
        if not any(key.startswith(f"{name.rstrip('.')}.") for key in keys):
            what, remedy = "nothing is there to be left out", "correct the name, in whole parts, or do not give it"
            yield Problem(what=what, key=shown(name), expected="the beginning of names of tensors", remedy=remedy)


def warn_of(left_out: Iterable[LeftOut]) -> None:
    """Say by a warning what was left out unasked: for calls whose result has no place to say it in."""
    for part in left_out:
        if part.announced:
            warnings.warn(str(part), stacklevel=3)


def left_out_json(left_out: Iterable[LeftOut]) -> list[dict[str, Any]]:
    """What was left out, as plain values: every name."""
    return [
        {
            "prefix": part.prefix,
            "announced_by_config": part.announced,
            "bytes": part.nbytes,
            "tensors": list(part.keys),
        }
        for part in left_out
    ]
