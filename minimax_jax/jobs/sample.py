"""A part of a checkpoint, chosen so that the same part is chosen each time, whatever the layout."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

from minimax_jax.errors import Problem, RequestError
from minimax_jax.layout.specs import Entry


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """Which part was looked at.

    Attributes:
        asked: what was asked for, such as `5%` or `40`.
        entries: how many entries, which are the tensors of the native form.
        of: how many there are.
    """

    asked: str
    entries: int
    of: int


def draw(entries: Sequence[Entry], asked: str) -> tuple[Sample, tuple[Entry, ...]]:
    """The entries that a sample takes, in their own order: those whose names have the smallest SHA-256.

    A larger sample holds every smaller one, and none depends on the order or on the layout.

    Args:
        entries: all there are.
        asked: a share such as `5%` (rounded up), or a number of entries such as `40`.

    Raises:
        RequestError: `asked` is neither, or nothing.
    """
    count = min(_count(asked, len(entries)), len(entries))
    ranked = sorted(entries, key=lambda entry: hashlib.sha256(entry.native.encode()).digest())
    taken = {entry.native for entry in ranked[:count]}
    chosen = tuple(entry for entry in entries if entry.native in taken)
    return Sample(asked=asked, entries=len(chosen), of=len(entries)), chosen


def require_sample(asked: str) -> None:
    """Check that a sample can be understood.

    Raises:
        RequestError: it is neither a share such as `5%` nor a number such as `40`, or it is nothing.
    """
    _count(asked, 1)


def _count(asked: str, total: int) -> int:
    number = asked.removesuffix("%")
    try:
        share = float(number)
    except ValueError:
        share = 0.0
    whole = asked == number
    most = math.inf if whole else 100
    if not 0 < share <= most or not math.isfinite(share) or (whole and not (asked.isascii() and asked.isdecimal())):
        expected = "a share such as 5%, or a number of entries such as 40"
        raise RequestError(Problem(what="no such sample", expected=expected, got=asked))
    return int(share) if whole else math.ceil(total * share / 100)
