"""The tensors of a checkpoint as a tree of their dotted names, in which runs of equal layers and experts are folded."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from minimax_jax.trees import nest


class Stored(Protocol):
    """What a tree shows of a tensor."""

    @property
    def dtype(self) -> str:
        """Name in safetensors' spelling."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes of the axes."""

    @property
    def nbytes(self) -> int:
        """Size in bytes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Node:
    """A step of names, or a run of steps that are numbers and hold the same.

    Attributes:
        name: the step; of a run, the first and the last: `0-61`.
        alike: how many steps the run has; 1 for a step by itself.
        tensors: how many tensors lie in all of it.
        nbytes: their bytes.
        dtype: of a tensor; None for what holds others.
        shape: of a tensor; None for what holds others.
        children: what one step of the run holds.
    """

    name: str
    alike: int = 1
    tensors: int
    nbytes: int
    dtype: str | None = None
    shape: tuple[int, ...] | None = None
    children: tuple[Node, ...] = ()


def tree_of(tensors: Mapping[str, Stored]) -> tuple[Node, ...]:
    """The tree of some tensors by name, in their order; numbers are sorted."""
    return _children(nest({key: (own.dtype, own.shape, own.nbytes) for key, own in tensors.items()}))


def _children(steps: Mapping[str, Any]) -> tuple[Node, ...]:
    numbered = all(step.isdecimal() and step.isascii() for step in steps)
    items = sorted(steps.items(), key=lambda item: int(item[0])) if numbered else steps.items()
    nodes = [_node(step, below) for step, below in items]
    return tuple(_folded(nodes)) if numbered else tuple(nodes)


def _node(name: str, below: Any) -> Node:
    if isinstance(below, dict):
        children = _children(below)
        tensors, nbytes = sum(child.tensors for child in children), sum(child.nbytes for child in children)
        return Node(name=name, tensors=tensors, nbytes=nbytes, children=children)
    dtype, shape, nbytes = below
    return Node(name=name, tensors=1, nbytes=nbytes, dtype=dtype, shape=shape)


def _folded(nodes: Iterable[Node]) -> Iterator[Node]:
    """Neighbours that hold the same, as one."""
    for _, run in itertools.groupby(enumerate(nodes), lambda at: (int(at[1].name) - at[0], at[1].children)):
        first, *others = (node for _, node in run)
        yield _run(first, others[-1], 1 + len(others)) if others else first


def _run(first: Node, last: Node, alike: int) -> Node:
    return Node(
        name=f"{first.name}-{last.name}",
        alike=alike,
        tensors=alike * first.tensors,
        nbytes=alike * first.nbytes,
        children=first.children,
    )
