"""Tells what is wrong with the tensors of a checkpoint in few words: causes first, many problems of one kind as one."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from typing import Protocol

from minimax_jax.errors import Problem, argument
from minimax_jax.layout.config import MiniMaxConfig
from minimax_jax.layout.forms import NESTED
from minimax_jax.layout.specs import Specs
from minimax_jax.layout.table import Name, dissect

_FEW = 3
"""So many problems of one kind are told one by one; so many names, and runs of numbers, stand in one message."""

_ENOUGH = 10
"""Fewer tensors than this are never called another model's."""


class Stored(Protocol):
    """What a check needs to know of a tensor; `file` is None in memory."""

    @property
    def dtype(self) -> str:
        """Name in safetensors' spelling."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes of the axes."""

    @property
    def file(self) -> object:
        """Where its bytes lie: what `str` makes a path or URL of, or None."""


def problem_of(what: str, key: str, stored: Stored, *, expected: str, got: str, remedy: str | None = None) -> Problem:
    """A problem of a tensor that is there, with its file."""
    file = None if stored.file is None else str(stored.file)
    return Problem(what=what, file=file, key=key, expected=expected, got=got, remedy=remedy)


def explain(
    tensors: Mapping[str, Stored],
    table: Specs,
    *,
    layout: str,
    problems: Sequence[Problem],
    unexpected: Sequence[str],
    partial: bool,
) -> list[Problem]:
    """What to tell about a checkpoint that failed its check: at least one problem.

    Args:
        tensors: all its tensors by name.
        table: what it was checked against.
        layout: whose names it should have.
        problems: what is wrong with its entries, one by one; each has a key.
        unexpected: names that it should not have.
        partial: whether whole entries may be absent.
    """
    if len(tensors) >= _ENOUGH and 10 * len(unexpected) > 9 * len(tensors):
        return [_foreign(tensors, table, unexpected)]
    config = table.config
    names = {key: dissect(key) for key in tensors}
    layers = _first_by_number((name.layer, key) for key, name in names.items())
    experts = _first_by_number((name.expert, key) for key, name in names.items())
    told_layers = {None, *layers}
    told = [problem for problem in problems if dissect(problem.key or "").layer in told_layers]
    told += (_unexpected(key, tensors[key], table) for key in unexpected if _is_within(names[key], config))
    named_layers = not partial and layout not in NESTED
    named_experts = layout == "hf" and bool(experts)
    return [
        *_miscounted("num_hidden_layers", config.num_hidden_layers, layers, tensors, complete=named_layers),
        *_miscounted("num_local_experts", config.num_local_experts, experts, tensors, complete=named_experts),
        *_folded(told),
    ]


def _foreign(tensors: Mapping[str, Stored], table: Specs, unexpected: Sequence[str]) -> Problem:
    first = unexpected[0]
    expected = f"names such as {next(iter(table.places))}"
    got = f"{len(unexpected):,} unknown names among {len(tensors):,}: {', '.join(unexpected[:_FEW])}, ..."
    return problem_of("not the tensors of a MiniMax-M2", first, tensors[first], expected=expected, got=got)


def _miscounted(
    attribute: str, count: int, seen: Mapping[int, str], tensors: Mapping[str, Stored], *, complete: bool
) -> Iterator[Problem]:
    """A problem where names have numbers past the last or, if they should be `complete`, lack some altogether."""
    surplus = sorted(number for number in seen if number >= count)
    absent = complete and any(number not in seen for number in range(count))
    if not surplus and not absent:
        return
    key = seen[surplus[0]] if surplus else None
    file = tensors[key].file if key else None
    remedies = ["fetch an incomplete download again"] if absent else []
    if surplus and attribute == "num_hidden_layers":
        remedies.append(f"name MTP modules in {argument('leave_out')}")
    yield Problem(
        what=f"the tensors do not fit {attribute} of config.json",
        file=str(file) if file else None,
        key=key,
        expected=f"{count}: {_spans(range(count))}",
        got=_spans(sorted(seen)) or "none",
        remedy=", or ".join([*remedies, f"correct {attribute}"]),
    )


def _unexpected(key: str, stored: Stored, table: Specs) -> Problem:
    got = f"{stored.dtype} {list(stored.shape)}"
    if key in table.places:
        return problem_of("name of the other layout", key, stored, expected="no such tensor", got=got)
    remedy = f"if nobody is to read it, name what it begins with in {argument('leave_out')}"
    return problem_of("unexpected tensor", key, stored, expected="no such tensor", got=got, remedy=remedy)


def _folded(problems: Iterable[Problem]) -> Iterator[Problem]:
    """Problems that differ in nothing but layer, expert and file, told as one with their number."""
    alike: dict[tuple[str | None, ...], list[Problem]] = defaultdict(list)
    for problem in problems:
        kind = dissect(problem.key or "").kind
        alike[problem.what, kind, problem.expected, problem.got, problem.remedy].append(problem)
    for first, *others in alike.values():
        if len(others) < _FEW:
            yield from (first, *others)
        else:
            yield dataclasses.replace(first, what=f"{first.what}, and {len(others):,} more of the kind")


def _first_by_number(numbered: Iterable[tuple[int | None, str]]) -> dict[int, str]:
    found: dict[int, str] = {}
    for number, key in numbered:
        if number is not None:
            found.setdefault(number, key)
    return found


def _is_within(name: Name, config: MiniMaxConfig) -> bool:
    return (name.layer or 0) < config.num_hidden_layers and (name.expert or 0) < config.num_local_experts


def _spans(numbers: Iterable[int]) -> str:
    """Sorted numbers in words: `0 to 3, 7`."""
    runs = [[number for _, number in run] for _, run in groupby(enumerate(numbers), lambda pair: pair[1] - pair[0])]
    spans = [str(run[0]) if len(run) == 1 else f"{run[0]} to {run[-1]}" for run in runs]
    return ", ".join(spans if len(spans) <= _FEW else [*spans[:_FEW], "..."])
