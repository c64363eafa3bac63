"""Names near to one that is not there, for messages."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from minimax_jax.layout.table import Name, dissect

_FEW = 3
_ALIKE = 0.6
"""Of the letters of two kinds of names, so many are the same where one may be meant for the other."""


def near_names(name: str, known: Iterable[str]) -> list[str]:
    """The few of `known` that `name` may be meant for, the likeliest first; none where nothing is like it.

    Kinds of names are compared, of which there are few, so that this does not take longer for many layers and experts.
    Of each kind the name of the same layer and expert is given or, where there is none, of the first.
    """
    by_kind: dict[str, dict[Name, str]] = {}
    for key in known:
        taken = dissect(key)
        by_kind.setdefault(taken.kind, {})[taken] = key
    asked = dissect(name)
    close = difflib.get_close_matches(asked.kind, by_kind, n=_FEW, cutoff=_ALIKE)
    close += [kind for kind in by_kind if asked.kind in kind and kind not in close]
    return [_of_kind(asked, by_kind[kind]) for kind in close[:_FEW]]


def _of_kind(asked: Name, keys: dict[Name, str]) -> str:
    """Of one kind the name of the layer and expert that are asked for, or else the first."""

    def distance(name: Name) -> tuple[bool, bool, int, int]:
        return name.layer != asked.layer, name.expert != asked.expert, name.layer or 0, name.expert or 0

    return keys[min(keys, key=distance)]
