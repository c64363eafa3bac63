"""What is done of a long job, on disk, so that a later process can go on.

A journal is a text file: a stamp that says which job it is, then one line of JSON per finished piece of work. A line is
appended in one write after the data it speaks of was written, and names a digest of that data: after a power cut the
line may be on disk and the data not, so a reader believes a line only when the data has that digest.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import xxhash

from minimax_jax.errors import JobError, Problem, argument, raise_if
from minimax_jax.io import points
from minimax_jax.io.files import Buffer, as_bytes, io_errors

PREFIX = ".journal"
"""Journals of a folder are named `.journal.<process>`."""

_FLAGS = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC


class Journal:
    """A context that appends to the journal of one process; `note` may be called from any number of threads."""

    def __init__(self, folder: Path, stamp: Mapping[str, Any], *, process: int = 0):
        """Open the journal, or begin it with `stamp`.

        Args:
            folder: where the work is.
            stamp: plain values that say which job it is.
            process: which of the processes at work on the folder writes it.

        Raises:
            JobError: the file cannot be written.
        """
        self._file = folder / f"{PREFIX}.{process}"
        self._lock = threading.Lock()
        with io_errors(JobError, "journal cannot be opened", self._file):
            self._fd = os.open(self._file, _FLAGS, 0o666)
            size = os.fstat(self._fd).st_size
        torn = size > 0 and os.pread(self._fd, 1, size - 1) != b"\n"
        if not size:
            self._append(_line(stamp))
        elif torn:  # the line that a dead process was writing; what follows must not be glued to it
            self._append(b"\n")

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *exception: object) -> None:
        os.close(self._fd)

    def note(self, record: Mapping[str, Any]) -> None:
        """Append a record.

        Raises:
            JobError: the file cannot be written.
        """
        points.reach("before the journal")
        self._append(_line(record))
        points.reach("after the journal")

    def sync(self) -> None:
        """Make what was noted survive a power cut."""
        with io_errors(JobError, "journal cannot be flushed to disk", self._file):
            os.fsync(self._fd)

    def _append(self, line: bytes) -> None:
        with self._lock, io_errors(JobError, "journal cannot be written", self._file):
            while line:
                line = line[os.write(self._fd, line) :]


def journals(folder: Path) -> list[Path]:
    """The journals of a folder, sorted."""
    return sorted(folder.glob(f"{PREFIX}.*"))


def has_records(folder: Path) -> bool:
    """Whether a journal of the folder names finished work; its first line is the stamp."""
    return any(file.read_bytes().count(b"\n") > 1 for file in journals(folder))


def read_journals(folder: Path, stamp: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The records of all journals of a folder. Lines that cannot be read, such as a torn last one, are left out.

    Raises:
        JobError: a journal is of another job than `stamp` says; all that differs.
    """
    for file in journals(folder):
        with io_errors(JobError, "journal cannot be read", file):
            lines = file.read_bytes().split(b"\n")
        found, *records = (_parse(line) for line in lines)
        if found is None and not any(records):
            continue  # the process died over its first line
        raise_if(_differences(file, found or {}, stamp), JobError)
        yield from filter(None, records)


def digest(pieces: Iterable[Buffer]) -> str:
    """The XXH3 digest of pieces of data one after another: 128 bits, hexadecimal. It finds damage, not intent."""
    state = new_digest()
    for piece in pieces:
        state.update(as_bytes(piece))
    return state.hexdigest()


def new_digest() -> xxhash.xxh3_128:
    """What `digest` computes with, for data that comes piece by piece."""
    return xxhash.xxh3_128()


def _line(record: Mapping[str, Any]) -> bytes:
    return json.dumps(record, sort_keys=True).encode() + b"\n"


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) else None


def _differences(file: Path, found: Mapping[str, Any], stamp: Mapping[str, Any]) -> Iterator[Problem]:
    for name in sorted({*found, *stamp}):
        if found.get(name) != stamp.get(name):
            yield Problem(
                what=f"unfinished work of another job stands here: its {name} differs",
                file=str(file.parent),
                expected=str(stamp.get(name)),
                got=str(found.get(name)),
                remedy=f"run that job again to end it, or give {argument('restart')} to throw its work away",
            )
