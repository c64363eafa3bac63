"""A folder that appears whole, by rename, or not at all."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from minimax_jax.errors import JobError, Problem
from minimax_jax.io.files import io_errors, sync_folder

MARK = ".unfinished"
"""The file that says of a folder that it is ours and not whole; locked by the process that fills it."""


@contextmanager
def appearing(destination: str | Path) -> Iterator[Path]:
    """A new folder to fill, `.<name>.partial` beside the destination, that takes its name when the block ends well.

    When the block fails, the folder is removed; what a killed process left is replaced by the next one.

    Args:
        destination: a folder that does not exist, or is empty; folders above it are made.

    Raises:
        JobError: the destination is taken, cannot be written, or another process is at work on it.
    """
    path = Path(os.path.realpath(destination))
    with io_errors(JobError, "destination cannot be written", path):
        _require_free(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        folder = path.with_name(f".{path.name}.partial")
        lock = _claim(folder)
    try:
        yield folder
        with io_errors(JobError, "folder cannot be renamed", path):
            (folder / MARK).unlink()
            sync_folder(folder)
            folder.replace(path)
            sync_folder(path.parent)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


def _require_free(path: Path) -> None:
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        what, remedy = "destination exists and is not an empty folder", "choose another, or delete it"
        raise JobError(Problem(what=what, file=str(path), remedy=remedy))


def _claim(folder: Path) -> int:
    """Make the folder, empty and marked, and return the descriptor that holds the lock on its mark."""
    if folder.exists():
        _remove_left_over(folder)
    folder.mkdir()
    lock = os.open(folder / MARK, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o666)
    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return lock


def _remove_left_over(folder: Path) -> None:
    if not (folder / MARK).is_file():
        what, remedy = "a folder that is not ours stands in the way", "move it away"
        raise JobError(Problem(what=what, file=str(folder), remedy=remedy))
    lock = os.open(folder / MARK, os.O_RDWR | os.O_CLOEXEC)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(folder)
    except BlockingIOError as error:
        what, remedy = "another process is writing to this destination", "wait for it, or choose another destination"
        raise JobError(Problem(what=what, file=str(folder), remedy=remedy)) from error
    finally:
        os.close(lock)
