"""Things that go wrong around a conversion: one clear error, nothing that looks whole, and the next run ends."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import signal
import stat
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from minimax_jax import cli
from minimax_jax.errors import CheckpointError
from minimax_jax.jobs import front
from trials.inject import failing, once_at
from trials.kills import Job
from trials.outcome import Child, Outcome, files, named

Fault = Callable[[Job, Path, Path], Any]
NOBODY = 65534


def disk_full_by_limit(job: Job, source: Path, out: Path) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    job.run(out)


def disk_full_in_the_middle(job: Job, source: Path, out: Path) -> None:
    failing("pwrite", errno.ENOSPC, 12)
    job.run(out)


def write_error(job: Job, source: Path, out: Path) -> None:
    failing("pwrite", errno.EIO, 20)
    job.run(out)


def flush_error(job: Job, source: Path, out: Path) -> None:
    failing("fsync", errno.EIO, 0)
    job.run(out)


def read_error(job: Job, source: Path, out: Path) -> None:
    failing("preadv", errno.EIO, 40)
    job.run(out)


def stale_handle(job: Job, source: Path, out: Path) -> None:
    failing("preadv", errno.ESTALE, 40)
    job.run(out)


def source_truncated(job: Job, source: Path, out: Path) -> None:
    def cut() -> None:
        for file in source.glob("*.safetensors"):
            os.truncate(file, file.stat().st_size - 1)

    once_at("before a write", 5, cut)
    job.run(out)


def source_replaced(job: Job, source: Path, out: Path) -> None:
    def replace() -> None:
        for file in source.glob("*.safetensors"):
            shutil.copy(file, file.with_suffix(".new"))
            file.with_suffix(".new").replace(file)

    once_at("before a write", 5, replace)
    job.run(out)


def source_written_to(job: Job, source: Path, out: Path) -> None:
    def write() -> None:
        for file in source.glob("*.safetensors"):
            file.write_bytes(file.read_bytes())

    once_at("before a write", 5, write)
    job.run(out)


def source_not_readable(job: Job, source: Path, out: Path) -> None:
    next(source.glob("*.safetensors")).chmod(0)
    out.parent.chmod(0o777)
    os.setuid(NOBODY)
    job.run(out)


def destination_not_writable(job: Job, source: Path, out: Path) -> None:
    out.parent.chmod(0o555)
    os.setuid(NOBODY)
    job.run(out)


def memory_budget_too_small(job: Job, source: Path, out: Path) -> None:
    front.convert(source, out, max_memory_bytes=1000)


def thread_runs_out_of_memory(job: Job, source: Path, out: Path) -> None:
    def fail() -> None:
        raise MemoryError("no memory left")

    once_at("before a write", 7, fail)
    job.run(out)


def thread_dies(job: Job, source: Path, out: Path) -> None:
    def die() -> None:
        raise SystemExit(17)

    once_at("before the journal", 7, die)
    job.run(out)


def small_disk(job: Job, source: Path, out: Path) -> None:
    """A real file system with too little room, where one may be mounted."""
    with tempfile.TemporaryDirectory() as folder:
        command = ["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", folder]
        if subprocess.run(command, capture_output=True).returncode:
            raise NotImplementedError
        try:
            front.convert(source, Path(folder) / "out")
        finally:
            subprocess.run(["umount", folder], check=True, capture_output=True)


FAULTS: dict[str, tuple[Fault, str]] = {
    "disk full: a limit of file sizes (RLIMIT_FSIZE)": (disk_full_by_limit, "JobError"),
    "disk full: a file system of 400 kB (tmpfs)": (small_disk, "JobError"),
    "disk full at the 13th write": (disk_full_in_the_middle, "JobError"),
    "I/O error at the 21st write": (write_error, "JobError"),
    "I/O error when data is flushed": (flush_error, "JobError"),
    "I/O error at the 41st read": (read_error, "FormatError"),
    "stale file handle at the 41st read": (stale_handle, "FormatError"),
    "source cut by a byte while it is read": (source_truncated, "FormatError"),
    "source replaced while it is read": (source_replaced, "FormatError"),
    "source written to while it is read": (source_written_to, "FormatError"),
    "source not readable": (source_not_readable, "FormatError"),
    "destination not writable": (destination_not_writable, "JobError"),
    "memory budget too small": (memory_budget_too_small, "JobError"),
    "a thread runs out of memory": (thread_runs_out_of_memory, "MemoryError"),
    "a thread dies": (thread_dies, "SystemExit"),
}
"""What goes wrong, and the error that it has to give."""


def tried(job: Job, source: Path, folder: Path, *, every: int = 1) -> Iterator[Outcome]:
    """Faults once each, or one in so many, on copies of the source and followed by a run to the end."""
    for what, (fault, expected) in list(FAULTS.items())[::every]:
        yield _try(job, source, folder, what, fault, expected)
    yield _two_at_once(job, folder / "twice")
    yield _short_reads(job, folder)
    yield _another_disk(job)
    for number, code in ((signal.SIGINT, 130), (signal.SIGTERM, 143)):
        yield _signalled(job, source, folder, number, code)


def _try(job: Job, source: Path, folder: Path, what: str, fault: Fault, expected: str) -> Outcome:
    if os.geteuid() and fault in (source_not_readable, destination_not_writable, small_disk):
        return Outcome(what=what, count=0, gave="not tried: it takes root", good=True)
    with tempfile.TemporaryDirectory(dir=folder) as place:
        Path(place).chmod(0o755)
        copy, work = Path(place) / "hf", Path(place) / "work"
        shutil.copytree(source, copy)
        work.mkdir()
        out = work / "out"
        ours = Job(**{**vars(job), "run": partial(_convert, copy)})
        _, told = Child(partial(fault, ours, copy, out)).ended()
        if isinstance(told, NotImplementedError):
            return Outcome(what=what, count=0, gave="not tried: nothing can be mounted here", good=True)
        gave, good = named(told), type(told).__name__ == expected
        if out.exists():
            gave, good = gave + "; something that looks whole was left", False
        return Outcome(what=what, count=1, gave=gave, good=good and _ends(ours, source, copy, out))


def _convert(source: Path, out: Path) -> None:
    front.convert(source, out, shard_bytes=300_000)


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
            front.convert(copy, out, shard_bytes=300_000, restart=True)

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
    """The command line, stopped in the middle by a signal that asks."""
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
