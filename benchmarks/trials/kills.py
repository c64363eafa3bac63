"""Conversions that are killed, at random and at every named moment, until one ends; its bytes are compared."""

from __future__ import annotations

import itertools
import os
import random
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from minimax_jax.io import points
from trials.jobs import Job
from trials.outcome import Child, Outcome, files, named

STAYS = {True: "went on; byte for byte the undisturbed output", False: "began anew; the undisturbed output"}
"""What has to come of it where a job goes on, and where it begins anew: the bytes are the same in both."""


def at_moments(work: list[Job], folder: Path, *, each: int) -> Iterator[Outcome]:
    """Kill every job at `each` occurrences of each named moment: the first, the last, and some between."""
    for goes_on, moment in itertools.product(STAYS, dict.fromkeys(itertools.chain(*(job.moments for job in work)))):
        killed = [job for job in work if job.goes_on == goes_on and moment in job.moments]
        results = [
            _survives(job, folder / "out", partial(_die_at, job.run, moment, number))
            for job in killed
            for number in _spread(job.moments[moment], each)
        ]
        if killed:
            names = "" if goes_on else ", " + ", ".join(job.name for job in killed)
            yield _outcome(f"SIGKILL {moment}{names}", results, goes_on=goes_on)


def at_random(work: list[Job], folder: Path, *, count: int, seed: int) -> Iterator[Outcome]:
    """Kill at random times; a third of what is killed is killed again as it goes on.

    It ends after `count` kills, if each job has been killed by then: one that ends sooner than it did is missed.
    """
    chance = random.Random(seed)
    results: dict[str, list[tuple[int, str]]] = {job.name: [] for job in work}
    for job in itertools.cycle(work):
        results[job.name].append(_survives_random(job, folder / "out", chance))
        killed = [sum(kills for kills, _ in found) for found in results.values()]
        if sum(killed) >= count and (all(killed) or sum(map(len, results.values())) > 10 * count):
            break
    for job in work:
        yield _outcome(f"SIGKILL at a random time, {job.name}", results[job.name], goes_on=job.goes_on)


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


def _outcome(what: str, results: list[tuple[int, str]], *, goes_on: bool) -> Outcome:
    count, wrong = sum(kills for kills, _ in results), [text for _, text in results if text]
    gave = STAYS[goes_on] if not wrong else f"{len(wrong)} wrong: {wrong[0]}"
    return Outcome(what=what, count=count, gave=gave, good=not wrong and count > 0)
