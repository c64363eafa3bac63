"""What can go wrong around a conversion, each as a function that brings it about and then runs the conversion."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from minimax_jax.jobs import front
from trials.inject import failing, once_at
from trials.jobs import Job

Cause = Callable[[Job, Path, Path], Any]
"""Runs a job whose source is the first path, and whose destination is the second."""

NOBODY = 65534


def call_fails(call: str, code: int, after: int) -> Cause:
    """A call of the operating system fails, after some that have gone well."""

    def cause(job: Job, source: Path, out: Path) -> None:
        failing(call, code, after)
        job.run(out)

    return cause


def shards_change(change: Callable[[Path], object]) -> Cause:
    """Something happens to every file of weights while they are read."""

    def cause(job: Job, source: Path, out: Path) -> None:
        once_at("before a write", 5, lambda: [change(file) for file in source.glob("*.safetensors")])
        job.run(out)

    return cause


def thread_raises(error: BaseException, moment: str) -> Cause:
    """One of the threads ends by an error in the middle."""

    def cause(job: Job, source: Path, out: Path) -> None:
        def end() -> NoReturn:
            raise error

        once_at(moment, 7, end)
        job.run(out)

    return cause


def replace(file: Path) -> None:
    """Put another file with the same bytes in the place of one."""
    copy = file.with_suffix(".new")
    shutil.copy(file, copy)
    copy.replace(file)


def size_limit(job: Job, source: Path, out: Path) -> None:
    """No file may grow large."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    job.run(out)


def small_disk(job: Job, source: Path, out: Path) -> None:
    """A real file system with too little room, where one may be mounted."""
    with tempfile.TemporaryDirectory() as folder:
        command = ["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", folder]
        if subprocess.run(command, capture_output=True).returncode:
            raise NotImplementedError
        try:
            job.run(Path(folder) / "out")
        finally:
            subprocess.run(["umount", folder], check=True, capture_output=True)


def not_readable(job: Job, source: Path, out: Path) -> None:
    """A file of weights that nobody may read."""
    next(source.glob("*.safetensors")).chmod(0)
    out.parent.chmod(0o777)
    os.setuid(NOBODY)
    job.run(out)


def not_writable(job: Job, source: Path, out: Path) -> None:
    """A folder that the destination may not be made in."""
    out.parent.chmod(0o555)
    os.setuid(NOBODY)
    job.run(out)


def small_budget(job: Job, source: Path, out: Path) -> None:
    """A memory budget that nothing fits in."""
    front.convert(source, out, max_memory_bytes=1000)


NEED_ROOT = (not_readable, not_writable, small_disk)

FAULTS: dict[str, tuple[Cause, str]] = {
    "disk full: a limit of file sizes (RLIMIT_FSIZE)": (size_limit, "JobError"),
    "disk full: a file system of 400 kB (tmpfs)": (small_disk, "JobError"),
    "disk full at the 13th write": (call_fails("pwrite", errno.ENOSPC, 12), "JobError"),
    "I/O error at the 21st write": (call_fails("pwrite", errno.EIO, 20), "JobError"),
    "I/O error when data is flushed": (call_fails("fsync", errno.EIO, 0), "JobError"),
    "I/O error at the 41st read": (call_fails("preadv", errno.EIO, 40), "FormatError"),
    "stale file handle at the 41st read": (call_fails("preadv", errno.ESTALE, 40), "FormatError"),
    "source cut by a byte while it is read": (
        shards_change(lambda file: os.truncate(file, file.stat().st_size - 1)),
        "FormatError",
    ),
    "source replaced while it is read": (shards_change(replace), "FormatError"),
    "source written to while it is read": (
        shards_change(lambda file: file.write_bytes(file.read_bytes())),
        "FormatError",
    ),
    "source not readable": (not_readable, "FormatError"),
    "destination not writable": (not_writable, "JobError"),
    "memory budget too small": (small_budget, "JobError"),
    "a thread runs out of memory": (thread_raises(MemoryError("no memory left"), "before a write"), "MemoryError"),
    "a thread dies": (thread_raises(SystemExit(17), "before the journal"), "SystemExit"),
}
"""What goes wrong, and the error that it has to give."""
