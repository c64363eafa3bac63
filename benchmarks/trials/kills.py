"""Conversions that are killed, at random and at every named moment, until one ends; its bytes are compared."""

from __future__ import annotations

import itertools
import os
import random
import shutil
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from minimax_jax import synthetic
from minimax_jax.io import points
from minimax_jax.jobs import front
from trials.outcome import Child, Outcome, files, in_child, named

SHARD_BYTES = 300_000
OPTIONS: dict[str, dict[str, Any]] = {
    "native bf16": {"to": "native", "dtype": "bf16", "workers": 2},
    "native fp8": {"to": "native", "dtype": "fp8", "workers": 1},
    "hf bf16": {"to": "hf", "dtype": "bf16", "workers": 3},
}


@dataclass(frozen=True, kw_only=True)
class Job:
    """A conversion with the bytes that it has to give.

    Attributes:
        seconds: how long it takes undisturbed, from the call to the end of the process.
        moments: how often each named moment is reached.
    """

    name: str
    run: Callable[[Path], None]
    expected: dict[str, bytes]
    seconds: float
    moments: dict[str, int]


def jobs(folder: Path, *, names: Sequence[str]) -> list[Job]:
    """The jobs to kill, each run once undisturbed."""
    folder.mkdir()
    in_child(partial(_synthesize, folder / "hf"))
    return [_job(name, folder) for name in names]


def _synthesize(folder: Path) -> None:
    synthetic.synthesize(folder, synthetic.config(layers=2, experts=4), shard_bytes=50_000)


def _job(name: str, folder: Path) -> Job:
    def run(out: Path) -> None:
        front.convert(folder / "hf", out, shard_bytes=SHARD_BYTES, **OPTIONS[name])

    expected = folder / f"undisturbed {name}"
    in_child(partial(run, expected))  # what is compiled for the first time is found in the cache later
    moments = in_child(partial(_counted, run, folder / f"counted {name}"))
    child = Child(partial(run, folder / f"timed {name}"))
    child.begun()
    began = time.monotonic()
    child.ended()
    seconds = time.monotonic() - began
    return Job(name=name, run=run, expected=files(expected), seconds=seconds, moments=moments)


def _counted(run: Callable[[Path], None], out: Path) -> dict[str, int]:
    counts: dict[str, int] = {}

    def count(name: str) -> None:
        counts[name] = counts.get(name, 0) + 1

    points.on_reach = count
    run(out)
    return counts


def at_moments(work: list[Job], folder: Path, *, each: int) -> Iterator[Outcome]:
    """Kill every job at `each` occurrences of each named moment: the first, the last, and some between."""
    for moment in work[0].moments:
        results = [
            _survives(job, folder / "out", partial(_die_at, job.run, moment, number))
            for job in work
            for number in _spread(job.moments[moment], each)
        ]
        yield _outcome(f"SIGKILL {moment}", results)


def at_random(work: list[Job], folder: Path, *, count: int, seed: int) -> Iterator[Outcome]:
    """Kill at random times until there were `count` kills; a third of what is killed is killed again as it goes on."""
    chance = random.Random(seed)
    results: dict[str, list[tuple[int, str]]] = {job.name: [] for job in work}
    for job in itertools.cycle(work):
        results[job.name].append(_survives_random(job, folder / "out", chance))
        if sum(kills for found in results.values() for kills, _ in found) >= count:
            break
    for name, found in results.items():
        yield _outcome(f"SIGKILL at a random time, {name}", found)


def _spread(total: int, each: int) -> list[int]:
    count = min(total, each)
    return sorted({1 + round(step * (total - 1) / max(count - 1, 1)) for step in range(count)})


def _die_at(run: Callable[[Path], None], moment: str, number: int, out: Path) -> None:
    left = [number]

    def die(reached: str) -> None:
        if reached == moment:
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    points.on_reach = die
    run(out)


def _survives(job: Job, out: Path, dying: Callable[[Path], None]) -> tuple[int, str]:
    """Kills, and what was wrong, if anything."""
    status, _ = Child(partial(dying, out)).ended()
    if status != -signal.SIGKILL:
        return 0, f"was not killed: {status}"
    return 1, _goes_on(job, out)


def _survives_random(job: Job, out: Path, chance: random.Random) -> tuple[int, str]:
    kills = 0
    for _ in range(2 if chance.random() < 1 / 3 else 1):
        child = Child(partial(job.run, out))
        child.begun()
        time.sleep(chance.uniform(0, job.seconds))
        child.kill()
        status, told = child.ended()
        kills += status == -signal.SIGKILL
        if status not in (0, -signal.SIGKILL):
            return kills, f"{named(told)}; then: {_goes_on(job, out)}"
        if out.exists():
            break
    return kills, _goes_on(job, out)


def _goes_on(job: Job, out: Path) -> str:
    """Run the job to its end after a kill and take it away; what was wrong, if anything."""
    try:
        if out.exists():  # killed behind the rename
            wrong = "" if files(out) == job.expected else "a destination that looks whole and is not"
            shutil.rmtree(out)
            if wrong:
                return wrong
        status, told = Child(partial(job.run, out)).ended()
        if status:
            return named(told)
        if files(out) != job.expected:
            return "other bytes"
        return "" if [path for path in out.parent.iterdir() if "partial" in path.name] == [] else "something was left"
    finally:
        shutil.rmtree(out, ignore_errors=True)
        shutil.rmtree(out.with_name(f".{out.name}.partial"), ignore_errors=True)


def _outcome(what: str, results: list[tuple[int, str]]) -> Outcome:
    count, wrong = sum(kills for kills, _ in results), [text for _, text in results if text]
    gave = "went on; byte for byte the undisturbed output" if not wrong else f"{len(wrong)} wrong: {wrong[0]}"
    return Outcome(what=what, count=count, gave=gave, good=not wrong and count > 0)
