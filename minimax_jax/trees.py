"""Flat native trees (dotted names) to nested pytrees and back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from minimax_jax.errors import LayoutError, Problem, raise_if


def nest(flat: Mapping[str, Any]) -> dict[str, Any]:
    """`{"a.b": x}` to `{"a": {"b": x}}`.

    Args:
        flat: leaves by dotted name; a leaf is anything but a dict. Not changed.

    Returns:
        New dicts; the leaves are the caller's own.

    Raises:
        LayoutError: a name stands where another passes through, or a leaf is a dict, so that `flatten` could not
            bring the tree back.

    Examples:
        >>> mj.nest({"model.norm.weight": 1, "lm_head.weight": 2})
        {'model': {'norm': {'weight': 1}}, 'lm_head': {'weight': 2}}
    """
    raise_if(_conflicts(flat), LayoutError)
    nested: dict[str, Any] = {}
    for name, leaf in flat.items():
        *path, last = name.split(".")
        node = nested
        for step in path:
            node = node.setdefault(step, {})
        node[last] = leaf
    return nested


def flatten(nested: Mapping[Any, Any]) -> dict[str, Any]:
    """The inverse of `nest`.

    Args:
        nested: dicts of dicts; anything that is not a dict is a leaf. Not changed. An empty dict has no leaves and
            leaves no trace; a step that is not text is written as text.

    Returns:
        A new dict by dotted name, in the tree's order; the leaves are the caller's own.

    Raises:
        LayoutError: two leaves have the same dotted name.

    Examples:
        >>> mj.flatten({"model": {"norm": {"weight": 1}}})
        {'model.norm.weight': 1}
    """
    flat: dict[str, Any] = {}
    problems = []
    for name, leaf in _leaves(nested):
        if name in flat:
            problems.append(Problem(what="two leaves of one name", key=name))
        flat[name] = leaf
    raise_if(problems, LayoutError)
    return flat


def _conflicts(flat: Mapping[str, Any]) -> Iterator[Problem]:
    inner = {name[:end] for name in flat for end, character in enumerate(name) if character == "."}
    for name, leaf in flat.items():
        if name in inner:
            yield Problem(what="a leaf stands where another name passes through", key=name)
        if isinstance(leaf, dict):
            yield Problem(what="a leaf is a dict", key=name, remedy="flatten the tree first")


def _leaves(nested: Mapping[Any, Any]) -> Iterator[tuple[str, Any]]:
    for step, node in nested.items():
        if isinstance(node, dict):
            yield from ((f"{step}.{name}", leaf) for name, leaf in _leaves(node))
        else:
            yield str(step), node
