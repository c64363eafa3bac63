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
from minimax_jax.io.folder import workshop_of
from minimax_jax.io.journal import PREFIX
from trials.jobs import Job, counted
from trials.outcome import Child, Outcome, files, named

STAYS = "went on, no noted piece done again; byte for byte the undisturbed output"
"""What has to come of it."""

PIECE_DONE = "before the journal"
"""The moment that each piece of work comes by when it is done rather than found done."""


def at_moments(work: list[Job], folder: Path, *, each: int) -> Iterator[Outcome]:
    """Kill every job at `each` occurrences of each named moment: the first, the last, and some between."""
    for moment in dict.fromkeys(itertools.chain(*(job.moments for job in work))):
        results = [
            _survives(job, folder / "out", partial(_die_at, job.run, moment, number))
            for job in work
            if moment in job.moments
            for number in _spread(job.moments[moment], each)
        ]
        yield _outcome(f"SIGKILL {moment}", results)


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
        yield _outcome(f"SIGKILL at a random time, {job.name}", results[job.name])


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
        noted = 0 if out.exists() else _noted(out)
        if out.exists():  # killed behind the rename
            wrong = "" if files(out) == job.expected else "a destination that looks whole and is not"
            shutil.rmtree(out)
            if wrong:
                return wrong
        left = job.moments.get(PIECE_DONE, 0) - noted
        status, told = Child(partial(counted, job.run, out)).ended()
        if status:
            return named(told)
        if files(out) != job.expected:
            return "other bytes"
        if told.get(PIECE_DONE, 0) > left:
            return f"{told[PIECE_DONE]} pieces done where {left} were left"
        return "" if [path for path in out.parent.iterdir() if "partial" in path.name] == [] else "something was left"
    finally:
        shutil.rmtree(out, ignore_errors=True)
        shutil.rmtree(out.with_name(f".{out.name}.partial"), ignore_errors=True)


def _noted(out: Path) -> int:
    """How many pieces of work the journal beside a destination names: whole lines but for the stamp."""
    journal = workshop_of(out) / f"{PREFIX}.0"
    return max(journal.read_bytes().count(b"\n") - 1, 0) if journal.exists() else 0


def _outcome(what: str, results: list[tuple[int, str]]) -> Outcome:
    count, wrong = sum(kills for kills, _ in results), [text for _, text in results if text]
    gave = STAYS if not wrong else f"{len(wrong)} wrong: {wrong[0]}"
    return Outcome(what=what, count=count, gave=gave, good=not wrong and count > 0)
