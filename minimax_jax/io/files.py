"""What the other modules here ask of the operating system: open, read and write exactly, stay inside a folder."""

from __future__ import annotations

import ctypes
import errno
import functools
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from minimax_jax.errors import CheckpointError, FormatError, JobError, Problem, saying
from minimax_jax.io.location import Location
from minimax_jax.nearby import did_you_mean

Buffer: TypeAlias = bytes | bytearray | memoryview | npt.NDArray[Any]

_SYNC_FILE_RANGE_WRITE = 2  # linux/fs.h: start to write what is dirty, and do not wait

_READ_FLAGS = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK  # O_NONBLOCK: opening a FIFO must not wait for a writer


@dataclass(frozen=True, kw_only=True, slots=True)
class FileState:
    """What a file was when it was looked at: two looks at an unchanged file are equal.

    Attributes:
        nbytes: its size.
        tag: what changes when it is written or replaced, as far as its place tells: time and inode, or an ETag.
    """

    nbytes: int
    tag: str

    @classmethod
    def of(cls, fd: int) -> FileState:
        """The state of a local file that is open."""
        return cls._of(os.fstat(fd))

    @classmethod
    def at(cls, file: Path) -> FileState:
        """The state of a local file."""
        return cls._of(file.stat())

    @classmethod
    def _of(cls, found: os.stat_result) -> FileState:
        return cls(nbytes=found.st_size, tag=f"time {found.st_mtime_ns}, inode {found.st_ino}")

    def __str__(self) -> str:
        return f"{self.nbytes:,} bytes, {self.tag}"


@contextmanager
def io_errors(kind: type[CheckpointError], what: str, file: Location, *, given: bool = False) -> Iterator[None]:
    """Turn an OSError inside the block into `kind`, saying `what` could not be done to `file`.

    Args:
        kind: the error to raise.
        what: what could not be done.
        file: to what.
        given: whether it is there that a user has said it is: what has a name like it is told where it is not.
    """
    try:
        yield
    except OSError as error:
        remedy = did_you_mean(file) if given and isinstance(file, Path) else None
        raise kind(Problem(what=what, file=str(file), got=error.strerror or saying(error), remedy=remedy)) from error


def open_regular(file: Path) -> int:
    """Open `file` for reading and return its descriptor.

    Raises:
        FormatError: it is missing, unreadable, or not a regular file (a folder, device, FIFO or socket).
    """
    with io_errors(FormatError, "file cannot be opened", file):
        fd = os.open(file, _READ_FLAGS)
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise FormatError(Problem(what="not a regular file", file=str(file)))
    return fd


def read_exactly(fd: int, file: Path, start: int, buffer: memoryview) -> None:
    """Fill `buffer` with the bytes of `file` from position `start` on.

    Interrupted calls are repeated by Python itself (PEP 475).

    Raises:
        FormatError: the file ends too early, or cannot be read.
    """
    done = 0
    while done < buffer.nbytes:
        with io_errors(FormatError, "file cannot be read", file):
            count = os.preadv(fd, [buffer[done:]], start + done)
        if count == 0:
            raise FormatError(short_file(file, expected_bytes=start + buffer.nbytes, got_bytes=start + done))
        done += count


def short_file(file: Location, *, expected_bytes: int, got_bytes: int, key: str | None = None) -> Problem:
    """The problem of a file that ends before its data does."""
    return Problem(
        what="file is truncated: an incomplete download or an interrupted copy",
        file=str(file),
        key=key,
        expected=f"at least {expected_bytes:,} bytes",
        got=f"{got_bytes:,} bytes",
        remedy="download or copy this file again",
    )


def write_exactly(fd: int, file: Path, start: int, data: memoryview) -> None:
    """Write all of `data` to `file` at position `start`.

    Raises:
        JobError: the file cannot be written (disk full, file size limit, ...).
    """
    done = 0
    while done < data.nbytes:
        with io_errors(JobError, "file cannot be written", file):
            done += os.pwrite(fd, data[done:], start + done)


def start_flush(fd: int, start: int, nbytes: int) -> None:
    """Let the disk begin with what was just written, so that a later flush finds little left; a hint, and no promise.

    Linux alone has it; what it returns is of no interest.
    """
    _sync_file_range()(fd, ctypes.c_int64(start), ctypes.c_int64(nbytes), _SYNC_FILE_RANGE_WRITE)


@functools.cache
def _sync_file_range() -> Callable[..., int]:
    call: Callable[..., int] = getattr(ctypes.CDLL(None), "sync_file_range", lambda *_: 0)
    return call


def as_bytes(data: Buffer) -> memoryview:
    """The bytes of `data` as a flat view `[nbytes]` of the same memory; read-only if `data` is.

    numpy hands out no buffer for the dtypes of ml_dtypes, hence the detour over uint8.

    Raises:
        JobError: the elements do not lie in row-major order without gaps.
    """
    view = data if isinstance(data, np.ndarray) else memoryview(data)
    contiguous = view.flags.c_contiguous if isinstance(view, np.ndarray) else view.c_contiguous
    if not contiguous:
        what = "array is not contiguous in row-major order, its bytes in memory are not those of the tensor"
        raise JobError(Problem(what=what, got=f"shape {view.shape}, strides {view.strides}", remedy="copy it first"))
    if isinstance(view, np.ndarray):
        return view.reshape(-1).view(np.uint8).data
    return view.cast("B") if view.nbytes else memoryview(b"")


def sync_file(file: Path) -> None:
    """Make what a file holds survive a power cut.

    Raises:
        JobError: the file cannot be opened or flushed.
    """
    with io_errors(JobError, "file cannot be flushed to disk", file):
        fd = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def sync_tree(folder: Path) -> None:
    """Make all files in a folder and below it survive a power cut, and their names; raises as `sync_folder`."""
    for place, _, names in os.walk(folder):
        for name in names:
            sync_file(Path(place) / name)
        sync_folder(Path(place))


def sync_folder(folder: Path) -> None:
    """Make the names in `folder` survive a power cut.

    Raises:
        JobError: the folder cannot be opened or flushed.
    """
    with io_errors(JobError, "folder cannot be flushed to disk", folder):
        fd = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        except OSError as error:
            if error.errno != errno.EINVAL:  # some network file systems cannot flush a folder
                raise
        finally:
            os.close(fd)
