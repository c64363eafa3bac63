"""Conversions that several processes share: one is killed, the rest are stopped, and the same command goes on."""

from __future__ import annotations

import os
import random
import shutil
import signal
import socket
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from minimax_jax.io import points
from trials.jobs import OPTIONS, Job, convert
from trials.outcome import Child, Outcome, files, named

MEMBERS = 2
MOMENTS = ("before a write", "before the journal", "after the journal", "in the certification")
GRACE_S = 0.2
"""How long the rest goes on alone, before it is stopped as a launcher would: jax itself waits for far longer."""


def at_random(job: Job, source: Path, folder: Path, *, count: int, seed: int) -> Iterator[Outcome]:
    """Kill the leader and another process of a team, `count` times each, at random moments of their work."""
    chance = random.Random(seed)
    for which, name in ((0, "the leader"), (1, "another process")):
        wrong = [text for _ in range(count) if (text := _survives(job, source, folder / "out", which, chance))]
        gave = f"{len(wrong)} wrong: {wrong[0]}" if wrong else "the same command went on; the undisturbed output"
        what = f"SIGKILL of {name} of {MEMBERS} that share a conversion, {job.name}"
        yield Outcome(what=what, count=count, gave=gave, good=not wrong)


def _survives(job: Job, source: Path, out: Path, which: int, chance: random.Random) -> str:
    """Lose one process, run the same again; what was wrong, if anything."""
    try:
        moment = chance.choice(MOMENTS)
        dies_at = moment, chance.randint(1, job.moments[moment] // MEMBERS)
        members = _team(job, source, out, {which: dies_at})
        status, told = members[which].ended()
        time.sleep(GRACE_S)
        for member in members[:which] + members[which + 1 :]:
            member.kill()
            member.ended()
        if status != -signal.SIGKILL:
            return f"was not killed: {status}, {told!r}"
        if out.exists():
            return "a destination that looks whole"
        ends = [member.ended() for member in _team(job, source, out, {})]
        if any(status for status, _ in ends):
            return "; ".join(named(told) for status, told in ends if status)
        return "" if files(out) == job.expected else "other bytes"
    finally:
        shutil.rmtree(out, ignore_errors=True)
        shutil.rmtree(out.with_name(f".{out.name}.partial"), ignore_errors=True)


def _team(job: Job, source: Path, out: Path, deaths: dict[int, tuple[str, int]]) -> list[Child]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    member = partial(_be_member, job.name, source, out, address)
    return [Child(partial(member, index, deaths.get(index))) for index in range(MEMBERS)]


def _be_member(name: str, source: Path, out: Path, address: str, index: int, death: tuple[str, int] | None) -> None:
    import jax

    group = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": str(MEMBERS), "JAX_PROCESS_ID": str(index)}
    os.environ.update(group)
    left = [death[1] if death else 0]

    def die(reached: str) -> None:
        if death and reached == death[0]:
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    points.on_reach = die
    convert(source, OPTIONS[name] | {"distributed": True}, out)
    jax.distributed.shutdown()  # which waits for the others: the leader serves them
