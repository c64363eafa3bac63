"""Things that go wrong around a conversion: one clear error, nothing that looks whole, and the next run ends."""

from __future__ import annotations

import dataclasses
import os
import shutil
import signal
import stat
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from minimax_jax import cli
from minimax_jax.errors import CheckpointError
from trials.causes import FAULTS, NEED_ROOT, Cause
from trials.inject import once_at
from trials.jobs import OPTIONS, Job, convert
from trials.outcome import Child, Outcome, files, named


def tried(job: Job, source: Path, folder: Path, *, every: int = 1) -> Iterator[Outcome]:
    """Faults once each, or one in so many, on copies of the source and followed by a run to the end."""
    for what, (cause, expected) in list(FAULTS.items())[::every]:
        yield _try(job, source, folder, what, cause, expected)
    yield _two_at_once(job, folder / "twice")
    yield _short_reads(job, folder)
    yield _another_disk(job)
    for number, code in ((signal.SIGINT, 130), (signal.SIGTERM, 143)):
        yield _signalled(job, source, folder, number, code)


def _try(job: Job, source: Path, folder: Path, what: str, cause: Cause, expected: str) -> Outcome:
    if os.geteuid() and cause in NEED_ROOT:
        return Outcome(what=what, count=0, gave="not tried: it takes root", good=True)
    with tempfile.TemporaryDirectory(dir=folder) as place:
        Path(place).chmod(0o755)
        copy, work = Path(place) / "hf", Path(place) / "work"
        shutil.copytree(source, copy)
        work.mkdir()
        out = work / "out"
        ours = dataclasses.replace(job, run=partial(convert, copy, OPTIONS[job.name]))
        _, told = Child(partial(cause, ours, copy, out)).ended()
        if isinstance(told, NotImplementedError):
            return Outcome(what=what, count=0, gave="not tried: nothing can be mounted here", good=True)
        gave, good = named(told), type(told).__name__ == expected
        if out.exists():
            gave, good = gave + "; something that looks whole was left", False
        return Outcome(what=what, count=1, gave=gave, good=good and _ends(ours, source, copy, out))


def _ends(job: Job, source: Path, copy: Path, out: Path) -> bool:
    """Whether the next run, with the fault gone, ends in the right bytes. A changed source takes `restart`."""
    out.parent.chmod(0o755)
    changed = any(stat.S_IMODE(file.stat().st_mode) == 0 for file in copy.iterdir())
    shutil.rmtree(copy)
    shutil.copytree(source, copy)
    shutil.rmtree(out, ignore_errors=True)

    def run() -> None:
        try:
            job.run(out)
        except CheckpointError as error:
            if "--restart" not in str(error) and not changed:
                raise
            convert(copy, OPTIONS[job.name] | {"restart": True}, out)

    status, _ = Child(run).ended()
    return status == 0 and files(out) == job.expected


def _two_at_once(job: Job, out: Path) -> Outcome:
    """A second conversion into the folder of one that waits in the middle until the second has ended."""
    arrived, go_on = out.with_suffix(".arrived"), out.with_suffix(".go-on")

    def wait() -> None:
        arrived.touch()
        while not go_on.exists():
            time.sleep(0.01)

    def first() -> None:
        once_at("before a write", 5, wait)
        job.run(out)

    one = Child(first)
    while not arrived.exists():
        time.sleep(0.01)
    _, told = Child(partial(job.run, out)).ended()
    go_on.touch()
    status, _ = one.ended()
    good = type(told).__name__ == "JobError" and status == 0 and files(out) == job.expected
    gave = f"the second: {named(told)}; the first: the right bytes"
    return Outcome(what="two conversions into one folder", count=1, gave=gave if good else named(told), good=good)


def _short_reads(job: Job, folder: Path) -> Outcome:
    def run() -> None:
        real = os.preadv

        def short(fd: int, buffers: list[memoryview], offset: int) -> int:
            return real(fd, [buffers[0][:1000]], offset)

        setattr(os, "preadv", short)  # noqa: B010 - a type checker takes no other way
        job.run(out)

    out = folder / "short"
    return _same("reads that give 1,000 bytes at most", job, out, Child(run).ended())


def _another_disk(job: Job) -> Outcome:
    with tempfile.TemporaryDirectory(dir="/dev/shm") as place:
        out = Path(place) / "out"
        return _same("a destination on another file system", job, out, Child(partial(job.run, out)).ended())


def _same(what: str, job: Job, out: Path, ended: tuple[int, Any]) -> Outcome:
    good = ended[0] == 0 and files(out) == job.expected
    shutil.rmtree(out, ignore_errors=True)
    return Outcome(what=what, count=1, gave="the right bytes" if good else named(ended[1]), good=good)


def _signalled(job: Job, source: Path, folder: Path, number: signal.Signals, code: int) -> Outcome:
    """The command line, stopped in the middle by a signal that asks. The job is what it does by default."""
    out = folder / "signalled"
    arguments = ["convert", str(source), str(out), "--shard-size", "300kB", "-q"]

    def stop() -> None:
        os.kill(os.getpid(), number)
        time.sleep(0.2)  # it is the main thread that gets it

    def command() -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # the background of a shell has it ignored
        once_at("before the journal", 9, stop)
        cli.cli(arguments)

    status, _ = Child(command).ended()
    good = status == code and not out.exists()
    again, _ = Child(partial(cli.cli, arguments)).ended()
    good = good and again == 0 and files(out) == job.expected
    shutil.rmtree(out, ignore_errors=True)
    shutil.rmtree(out.with_name(f".{out.name}.partial"), ignore_errors=True)
    return Outcome(
        what=f"{number.name} in the middle", count=1, gave=f"exit code {status}; the same command goes on", good=good
    )
