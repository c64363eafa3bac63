"""A folder that appears whole, by rename, or not at all."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from minimax_jax.errors import JobError, Problem
from minimax_jax.io import points
from minimax_jax.io.files import io_errors, sync_folder
from minimax_jax.io.journal import has_records
from minimax_jax.io.jsonfile import TEMPORARY_SUFFIX
from minimax_jax.io.location import locate
from minimax_jax.paths import is_folder, path_of

MARK = ".unfinished"
"""The file that says of a folder that it is ours and not whole; locked by the process that fills it."""


def _never(folder: Path) -> bool:
    return False


@contextmanager
def appearing(
    destination: str | Path, *, worth: Callable[[Path], bool] = _never, restart: bool = False
) -> Iterator[Path]:
    """A folder to fill that takes its name when the block ends well.

    Until then it stands in a workshop, the folder `.<name>.partial` beside the destination. When the block fails, the
    workshop is removed, and what a killed process left is replaced by the next one, unless it is worth keeping.

    Args:
        destination: a folder that does not exist, or is empty; folders above it are made.
        worth: of a workshop, whether it holds work to go on with. Then it stays when the block fails, and the next
            block goes on with it.
        restart: throw away what is left, worth keeping or not.

    Raises:
        JobError: the destination is taken, cannot be written, or another process is at work on it.
    """
    path = _real(destination)
    workshop = workshop_of(path)
    folder = workshop / path.name
    with io_errors(JobError, "destination cannot be written", path):
        _require_free(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = _claim(workshop)
    try:
        if worth is _never and not restart:
            _require_no_work(workshop, folder)
        if restart or not (folder.is_dir() and worth(workshop)):  # no folder: it has taken its name already
            _empty(workshop)
        folder.mkdir(exist_ok=True)
        for left in folder.glob(f".*{TEMPORARY_SUFFIX}"):
            left.unlink()
        yield folder
        with io_errors(JobError, "folder cannot be renamed", path):
            _name(folder, path)
        _remove(workshop)
    except BaseException as error:
        if worth(workshop) or has_records(workshop):
            error.add_note(f"what was done is kept in {workshop}: the same command goes on from there")
        else:
            _remove(workshop)
        raise
    finally:
        os.close(lock)


def require_apart(source: str | Path, destination: str | Path) -> None:
    """Check that a destination is not inside of a local source, whose files would change while they are read.

    Raises:
        JobError: it is.
    """
    place = locate(source)
    if isinstance(place, Path) and is_folder(place) and _real(place) in _real(destination).parents:
        what, remedy = "the destination is inside of the source", "choose a folder beside it"
        raise JobError(Problem(what=what, file=str(destination), got=f"within {place}", remedy=remedy))


def workshop_of(destination: str | Path) -> Path:
    """The folder in which a destination stands before it takes its name."""
    path = _real(destination)
    return path.with_name(f".{path.name}.partial")


def _real(path: str | Path) -> Path:
    """The path with its links followed, as far as they lead anywhere."""
    return Path(os.path.realpath(path_of(path)))


def _name(folder: Path, path: Path) -> None:
    sync_folder(folder)
    points.reach("before the rename")
    folder.replace(path)
    points.reach("after the rename")
    sync_folder(path.parent)


def _require_free(path: Path) -> None:
    if os.path.lexists(path) and (not path.is_dir() or any(path.iterdir())):  # a link here leads to itself
        what, remedy = "destination exists and is not an empty folder", "choose another, or delete it"
        raise JobError(Problem(what=what, file=str(path), remedy=remedy))
    if path.is_mount():
        what, remedy = "destination is a mount point, which cannot be renamed", "choose a folder inside of it"
        raise JobError(Problem(what=what, file=str(path), remedy=remedy))


def _claim(workshop: Path) -> int:
    """Make the workshop, marked, or take over one that is left; the descriptor that is returned locks its mark."""
    if os.path.lexists(workshop) and not _is_ours(workshop):
        what, remedy = "a folder that is not ours stands in the way", "move it away"
        raise JobError(Problem(what=what, file=str(workshop), remedy=remedy))
    workshop.mkdir(exist_ok=True)
    lock = os.open(workshop / MARK, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o666)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(lock)
        if not isinstance(error, BlockingIOError):
            raise
        what, remedy = "another process is writing to this destination", "wait for it, or choose another destination"
        raise JobError(Problem(what=what, file=str(workshop), remedy=remedy)) from error
    if not _is_mark(lock, workshop / MARK):  # whoever had it took it away between the opening and the locking
        os.close(lock)
        what, remedy = "another process has just ended or begun here", "run the same command again"
        raise JobError(Problem(what=what, file=str(workshop), remedy=remedy))
    return lock


def _is_mark(lock: int, mark: Path) -> bool:
    return mark.exists() and os.path.samestat(os.fstat(lock), mark.stat())


def _require_no_work(workshop: Path, folder: Path) -> None:
    """Refuse to throw away what another kind of job has done, and can go on with."""
    if folder.is_dir() and has_records(workshop):
        remedy = "run that job again to end it, or delete this folder"
        problem = Problem(what="unfinished work of another job stands here", file=str(workshop), remedy=remedy)
        raise JobError(problem)


def _is_ours(workshop: Path) -> bool:
    """Whether it is marked; or empty, as it is just before it gets its mark and just after it has lost it."""
    if workshop.is_symlink():  # what it leads to is not ours to empty
        return False
    return (workshop / MARK).is_file() or (workshop.is_dir() and not any(workshop.iterdir()))


def _remove(workshop: Path) -> None:
    """Take a workshop away, its mark last: wherever that stops, what is left is still known for ours."""
    with suppress(OSError):
        _empty(workshop)
        shutil.rmtree(workshop)


def _empty(workshop: Path) -> None:
    for path in workshop.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != MARK:
            path.unlink()
