"""Every error this library raises on bad input: one base class and a closed set of children.

A check looks at the whole of what it was given, gathers a `Problem` for each thing that is wrong, and raises once.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

_SHOWN = 20


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One thing that is wrong: what, where, what was expected, what was found, and what to do about it."""

    what: str
    file: str | None = None
    key: str | None = None
    expected: str | None = None
    got: str | None = None
    remedy: str | None = None

    def __str__(self) -> str:
        fields = ("file", "key", "expected", "got", "remedy")
        details = [f"{name}: {value}" for name in fields if (value := getattr(self, name)) is not None]
        return "\n    ".join([self.what, *details])


class CheckpointError(Exception):
    """Base of every error that bad input can cause.

    Attributes:
        problems: everything that was found wrong, in the order in which it was found.
    """

    def __init__(self, problems: Problem | Iterable[Problem]):
        self.problems = (problems,) if isinstance(problems, Problem) else tuple(problems)
        super().__init__(self.text(most=_SHOWN))

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.problems,), self.__dict__

    def text(self, *, most: int | None = None) -> str:
        """What went wrong, with the first `most` problems; None for all of them."""
        if len(self.problems) == 1:
            return str(self.problems[0])
        lines = [f"{len(self.problems)} problems"]
        lines += [f"  {number}. {problem}" for number, problem in enumerate(self.problems[:most], 1)]
        if most is not None and len(self.problems) > most:
            lines.append(f"  ... and {len(self.problems) - most} more")
        return "\n".join(lines)


def saying(error: BaseException) -> str:
    """What an error says, or what kind it is where it says nothing: many of the network's have no text."""
    return str(error).strip() or type(error).__name__


class ConfigError(CheckpointError):
    """A config.json that is missing, malformed, or describes something this library does not support."""


class FormatError(CheckpointError):
    """A safetensors file, index or sidecar whose bytes do not keep to their format."""


class LayoutError(CheckpointError):
    """Tensors that are missing, unexpected, incomplete, or of another shape or dtype than the layout says."""


class NumericError(CheckpointError):
    """Values that cannot be converted truthfully, such as NaN or infinity in a weight to be quantised."""


class JobError(CheckpointError):
    """A job that cannot run: the destination is taken, the budget or the disk too small, a write failed."""


class RequestError(JobError):
    """Arguments that make no sense, or contradict each other, whatever the input: the command line calls it usage."""


_OPTIONS = {"max_memory_bytes": "max-memory", "shard_bytes": "shard-size", "ignore": "ignore-attribute"}
"""Options of the command line that have another name than the argument of Python."""


def argument(name: str, value: str | None = None) -> str:
    """What a remedy calls an argument, in Python and on a command line: `to="hf" (--to hf)`, `restart (--restart)`."""
    option = f"--{_OPTIONS.get(name, name.replace('_', '-'))}"
    return f"{name} ({option})" if value is None else f'{name}="{value}" ({option} {value})'


def raise_if(problems: Iterable[Problem], kind: type[CheckpointError]) -> None:
    """Raise `kind` with all of `problems`; do nothing when there are none."""
    found = tuple(problems)
    if found:
        raise kind(found)
