"""How fast a source is read and a disk written, from a quick look that leaves nothing behind."""

from __future__ import annotations

import functools
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minimax_jax.display import Displayed, size
from minimax_jax.errors import JobError, Problem
from minimax_jax.io.files import io_errors
from minimax_jax.io.folder import workshop_of
from minimax_jax.io.header import TensorInfo
from minimax_jax.io.reader import Reader
from minimax_jax.jobs.plan import Plan
from minimax_jax.jobs.source import Source, by_ranges
from minimax_jax.jobs.streamed import StreamedPlan
from minimax_jax.paths import path_of

MOST_BYTES = 128 * 2**20
"""Bytes that are read, and bytes that are written, at most."""

_PIECE_BYTES = 8 * 2**20
_SYNC_BYTES = 4 * _PIECE_BYTES
_MOST_SECONDS = 5.0
"""After this long no further piece is begun."""

_SHARE_OF_FREE = 10
"""At most one in so many free bytes is written."""


@dataclass(frozen=True, kw_only=True, repr=False)
class Probe(Displayed):
    """What a probe found.

    Attributes:
        folder: where was written: the destination, or the nearest folder above it that exists.
        free_bytes: room there.
        needed_bytes: what the conversion will write.
        read_bytes: how much was read of the source.
        written_bytes: how much was written.
        read_rate: bytes of the source in a second, on as many threads as the plan has, past the page cache.
        write_rate: bytes written in a second, flushed to the disk; 0 where there was no room to try it.
        seconds: least and most time that a conversion takes at these rates: with reading and writing at the same time,
            and one after the other. What the processor takes is not in it.
    """

    folder: Path
    free_bytes: int
    needed_bytes: int
    read_bytes: int
    written_bytes: int
    read_rate: float
    write_rate: float
    seconds: tuple[float, float] | None

    @property
    def fits(self) -> bool:
        """Whether there is room for the output."""
        return self.needed_bytes <= self.free_bytes

    def views(self) -> Iterable[Any]:
        """What there is to look at."""
        from minimax_jax.jobs.report import probe_view

        yield f"{size(self.needed_bytes)} to write, {size(self.free_bytes)} free in {self.folder}"
        yield from probe_view(self)


def probe(plan: Plan | StreamedPlan, destination: Path) -> Probe:
    """Read a part of a plan's source, and write a nameless file where its output is to be.

    Args:
        plan: what is to be done.
        destination: where its output is to be; it need not exist, and is not made.

    Raises:
        JobError: nothing can be written there, or nothing of that name.
        FormatError: the source cannot be read.
    """
    folder = _nearest(destination)
    _require_short_names(destination, folder)
    with io_errors(JobError, "destination cannot be written", folder):
        free = shutil.disk_usage(folder).free
        written, write_rate = _write(folder, min(MOST_BYTES, free // _SHARE_OF_FREE))
    read, read_rate = _read(plan.source, plan.workers)
    seconds = None
    if read_rate and write_rate:
        both = plan.read_bytes / read_rate, plan.write_bytes / write_rate
        seconds = max(both), sum(both)
    return Probe(
        folder=folder,
        free_bytes=free,
        needed_bytes=plan.write_bytes,
        read_bytes=read,
        written_bytes=written,
        read_rate=read_rate,
        write_rate=write_rate,
        seconds=seconds,
    )


def _nearest(destination: Path) -> Path:
    """The destination, or the nearest folder above it that exists."""
    path = Path(os.path.realpath(path_of(destination)))
    return next(folder for folder in (path, *path.parents) if os.path.isdir(folder))  # noqa: PTH112 - no name is too long for it


def _require_short_names(destination: Path, folder: Path) -> None:
    """Refuse a destination that could not be made: the room is another's, and the time is never."""
    path = Path(os.path.realpath(destination))
    made = {*path.relative_to(folder).parts, workshop_of(path).name}  # the longest of them, a folder beside it
    longest = os.pathconf(folder, "PC_NAME_MAX")
    too_long = next((name for name in made if len(os.fsencode(name)) > longest), None)
    if too_long is not None:
        expected, got = f"at most {longest} bytes", f"{len(os.fsencode(too_long))} bytes"
        what, remedy = "name too long for the disk of the destination", "choose a shorter one"
        raise JobError(Problem(what=what, file=str(destination), expected=expected, got=got, remedy=remedy))


def _write(folder: Path, most_bytes: int) -> tuple[int, float]:
    """Bytes written and flushed, and the rate; the file has no name, so that nothing is left even by a kill."""
    piece = os.urandom(_PIECE_BYTES)  # some disks compress
    written, started = 0, time.monotonic()
    with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
        while written + len(piece) <= most_bytes and time.monotonic() - started < _MOST_SECONDS:
            written += file.write(piece) or 0
            if written % _SYNC_BYTES == 0:
                os.fsync(file.fileno())
        os.fsync(file.fileno())
    return written, _rate(written, started)


def _read(source: Source, workers: int) -> tuple[int, float]:
    """Bytes read of the source, and the rate; in pieces from all over it."""
    pieces = list(_pieces(source))
    for info, start, nbytes in pieces:
        _forget(info, start, nbytes)
    started = time.monotonic()
    with by_ranges(source).reader() as reader, ThreadPoolExecutor(workers, thread_name_prefix="probe") as pool:
        within = functools.partial(_read_piece, reader, lambda: time.monotonic() - started < _MOST_SECONDS)
        read = sum(pool.map(within, pieces))
    return read, _rate(read, started)


def _read_piece(reader: Reader, in_time: Callable[[], bool], piece: tuple[TensorInfo, int, int]) -> int:
    info, start, nbytes = piece
    if not in_time():
        return 0
    reader.read_into(info.file, start, bytearray(nbytes))
    return nbytes


def _pieces(source: Source) -> Iterator[tuple[TensorInfo, int, int]]:
    """Tensors, or their beginnings, spread evenly over the source; where each begins, and how many bytes of it."""
    infos = sorted(source.checkpoint.tensors.values(), key=lambda info: info.nbytes, reverse=True)
    total = sum(min(info.nbytes, _PIECE_BYTES) for info in infos)
    step = max(1, -(-total // MOST_BYTES))
    read = 0
    for info in infos[::step]:
        nbytes = min(info.nbytes, _PIECE_BYTES)
        if read + nbytes <= MOST_BYTES:
            read += nbytes
            yield info, info.start, nbytes


def _forget(info: TensorInfo, start: int, nbytes: int) -> None:
    """Ask the system to drop a piece of a file from its cache: what matters is the rate of what is not there yet."""
    if not isinstance(info.file, Path) or not info.file.is_file() or not hasattr(os, "posix_fadvise"):
        return
    fd = os.open(info.file, os.O_RDONLY)
    try:
        os.posix_fadvise(fd, start, nbytes, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(fd)


def _rate(nbytes: int, started: float) -> float:
    return nbytes / max(time.monotonic() - started, 1e-9)
