"""Orbax checkpoints of trees: saved whole, described, restored; `orbax_rows` lays them out and fills them by rows.

    ocp.load(folder)  # any of them, by Orbax alone: {"name": array}

A tree may be nested as well: its arrays are then known by their paths, with dots between the steps, as Orbax has them.

orbax-checkpoint is an extra of this package, and nothing of it is imported before it is used.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from minimax_jax.dtypes import NAMES
from minimax_jax.errors import CheckpointError, FormatError, JobError, Problem, saying
from minimax_jax.paths import is_file

if TYPE_CHECKING:
    import jax

OWN_FILES = ("_CHECKPOINT_METADATA", "orbax.checkpoint", "commit_success.txt")
"""What Orbax writes into the folder of a checkpoint, beside the folders of its items; the first is always there."""

_SHOWN = 400
NO_SUCH = "not an Orbax checkpoint, or an incomplete one"
"""What is wrong with a folder of which Orbax can make nothing."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Stored:
    """An array of an Orbax checkpoint: its name in the tree, dtype (by format name), shape, and the checkpoint."""

    key: str
    dtype: str
    shape: tuple[int, ...]
    file: Path


def is_orbax(path: Path) -> bool:
    """Whether a folder is an Orbax checkpoint."""
    return is_file(path / OWN_FILES[0])


def trees(folder: Path) -> tuple[Path, ...]:
    """The folders of trees of arrays inside a checkpoint: what Orbax calls them is its own affair."""
    return tuple(metadata.parent for metadata in folder.glob("*/_METADATA"))


def require() -> Any:
    """`orbax.checkpoint.v1`.

    Raises:
        JobError: it is not installed.
    """
    try:
        from orbax.checkpoint import v1
    except ImportError as error:
        remedy = "pip install 'minimax_jax[orbax]'"
        raise JobError(Problem(what="orbax-checkpoint is not installed", got=str(error), remedy=remedy)) from error
    return v1


def save(folder: Path, tensors: Mapping[str, Any]) -> None:
    """Save a flat tree whole; Orbax's own way and files. Every process calls it, and writes its own shards.

    Args:
        folder: does not exist yet; it appears whole or not at all.
        tensors: JAX arrays, or numpy arrays that are the same in every process.

    Raises:
        JobError: the folder exists, or cannot be written; Orbax is not installed.
    """
    ocp = require()
    if folder.exists():  # Orbax would say so too, but leave coroutines behind that nobody awaits
        remedy = "choose another, or delete it"
        raise JobError(Problem(what="destination of an Orbax checkpoint exists", file=str(folder), remedy=remedy))
    with Errors(JobError, "Orbax checkpoint cannot be saved", folder):
        ocp.save(folder.absolute(), dict(tensors))


def describe(folder: Path) -> dict[str, Stored]:
    """Every array of a checkpoint by name, from its metadata alone.

    Raises:
        FormatError: not a whole Orbax checkpoint of one flat tree of arrays.
        JobError: Orbax is not installed.
    """
    ocp = require()
    with Errors(FormatError, NO_SUCH, folder):
        found = ocp.metadata(folder.absolute()).metadata
    leaves = dict(_paths(found)) if isinstance(found, dict) else {}
    if not leaves or not all(hasattr(leaf, "shape") for leaf in leaves.values()):
        expected = "one tree of arrays by name, all of them there"
        raise FormatError(Problem(what=NO_SUCH, file=str(folder), expected=expected))
    return {key: stored_as(folder, key, leaf) for key, leaf in leaves.items()}


def _paths(tree: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """The leaves of nested dicts, by the steps to them with dots between."""
    for step, node in tree.items():
        if isinstance(node, dict):
            yield from ((f"{step}.{name}", leaf) for name, leaf in _paths(node))
        else:
            yield str(step), node


def stored_as(folder: Path, key: str, leaf: Any) -> Stored:
    """What an array, or its metadata, is when it is stored."""
    dtype = np.dtype(leaf.dtype)
    return Stored(key=key, dtype=NAMES.get(dtype, str(dtype)), shape=tuple(leaf.shape), file=folder)


def restore(folder: Path, like: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
    """Restore arrays, each with the sharding asked for: every process reads the bytes of its own shards.

    Args:
        folder: an Orbax checkpoint of one flat tree.
        like: shape, dtype and sharding of every array in it; no other dtype than the stored one is asked for.

    Returns:
        New arrays by name.

    Raises:
        FormatError: arrays that are missing or damaged.
        JobError: Orbax is not installed.
    """
    ocp = require()
    with Errors(FormatError, "Orbax checkpoint cannot be restored", folder):
        restored: dict[str, jax.Array] = ocp.load(folder.absolute(), dict(like))
    return restored


class Errors:
    """Turn what Orbax and TensorStore raise inside the block into an error of this library; all else passes."""

    def __init__(self, kind: type[CheckpointError], what: str, folder: Path, key: str | None = None):
        self._kind, self._what, self._folder, self._key = kind, what, folder, key

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        # What goes wrong with a shard of an array, Orbax wraps in a bare Exception.
        told = error.__cause__ if kind is Exception and error is not None else error
        if isinstance(told, OSError | ValueError | KeyError):
            got = saying(told)[:_SHOWN]
            raise self._kind(Problem(what=self._what, file=str(self._folder), key=self._key, got=got)) from error
