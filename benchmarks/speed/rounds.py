"""Contestants, measured in turn."""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from rich.progress import track

Role = Literal["ours", "peer", "bound"]


class NotTheSameBits(Exception):
    """A contestant's result is not that of the oracle: nothing it measured counts."""


@dataclass(frozen=True, kw_only=True)
class Contestant:
    """Something to be measured.

    Attributes:
        section: what it does; those of one section are compared.
        name: how.
        role: whose it is.
        nbytes: bytes of FP8 checkpoint that one call reads, or of the FP8 weights that it makes.
        run: does it once.
        before: brings about what `run` finds; not timed.
        check: raises NotTheSameBits if what `run` returned, or left behind, is wrong.
        experts: of the layer that it works on.
    """

    section: str
    name: str
    role: Role
    nbytes: int
    run: Callable[[], object]
    before: Callable[[], object] = lambda: None
    check: Callable[[object], object] = lambda result: None
    experts: int


@dataclass(kw_only=True)
class Figures:
    """What was measured of one contestant, by round.

    Attributes:
        seconds: wall-clock time.
        core_seconds: user and system time of the process, all threads.
        peak_bytes: most memory over that at the start of the call; 0 where the system does not tell.
    """

    contestant: Contestant
    seconds: list[float] = field(default_factory=list)
    core_seconds: list[float] = field(default_factory=list)
    peak_bytes: int = 0


def in_turn(contestants: Sequence[Contestant], rounds: int, *, twice: bool) -> list[Figures]:
    """Check every contestant in one untimed round, then measure all of them in turn, `rounds` times.

    Args:
        contestants: what to measure.
        rounds: how often.
        twice: whether each turn has two runs, of which the second counts. The memory that it takes is what the first
            gave back. Memory that another contestant gave back some time ago may have gone on to the host of a virtual
            machine, and comes back from there more slowly than anything here works.

    Raises:
        NotTheSameBits: a result is wrong.
    """
    for one in track(contestants, "checking", transient=True):
        one.before()
        one.check(one.run())
    found = [Figures(contestant=one) for one in contestants]
    for _ in track(range(rounds), "measuring", transient=True):
        for figures in found:
            if twice:
                figures.contestant.before()
                figures.contestant.run()
            _measure(figures)
    return found


def _measure(figures: Figures) -> None:
    figures.contestant.before()
    gc.collect()
    _forget_peak()
    resident, cores, began = _status_bytes("VmRSS"), _core_seconds(), time.perf_counter()
    figures.contestant.run()
    figures.seconds.append(time.perf_counter() - began)
    figures.core_seconds.append(_core_seconds() - cores)
    figures.peak_bytes = max(figures.peak_bytes, _status_bytes("VmHWM") - resident)


def peak_of(work: Callable[[], object]) -> int:
    """Most memory, in bytes, over that at the start, while `work` is done; 0 where the system does not tell."""
    gc.collect()
    _forget_peak()
    resident = _status_bytes("VmRSS")
    work()
    return max(0, _status_bytes("VmHWM") - resident)


def _core_seconds() -> float:
    times = os.times()
    return times.user + times.system


def _forget_peak() -> None:
    try:
        with Path("/proc/self/clear_refs").open("w") as reset:
            reset.write("5")
    except OSError:  # not Linux, or not allowed
        pass


def _status_bytes(name: str) -> int:
    try:
        with Path("/proc/self/status").open() as lines:
            return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))
    except OSError:
        return 0


def by_name(found: Iterable[Figures]) -> dict[tuple[str, str], Figures]:
    """Figures by section and name."""
    return {(one.contestant.section, one.contestant.name): one for one in found}
