"""Paths as users give them, and what may stand behind one."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

from minimax_jax.errors import FormatError, Problem, RequestError, saying

_SHOWN = 200


def path_of(given: str | Path) -> Path:
    """The path that a user gives. Every path of the public API goes through here, or through `io.source.pin`.

    Raises:
        RequestError: no file can have such a name.
    """
    require_nameable(str(given))
    return Path(given)


def require_nameable(name: str) -> None:
    """Check that a file system can hold a name: of others, Python says so by a bare ValueError.

    Raises:
        RequestError: it holds a zero byte, or half of a surrogate pair.
    """
    try:
        if b"\0" not in os.fsencode(name):
            return
    except UnicodeEncodeError:
        pass
    what, expected = "no file can have such a name", "no zero byte, and no half of a surrogate pair"
    named = ascii(name.partition("?")[0])  # what follows that may be the signature of a URL
    raise RequestError(Problem(what=what, file=named[:_SHOWN], expected=expected, remedy="correct the path"))


def is_folder(path: Path) -> bool:
    """Whether there is a folder: where that cannot be told, as of a name that is too long, there is none."""
    return os.path.isdir(path)  # noqa: PTH112 - the method of a Path raises of some names


def is_file(path: Path) -> bool:
    """The same of a regular file."""
    return os.path.isfile(path)  # noqa: PTH113


def require_inside(file: Path, folder: Path) -> None:
    """Check that `file`, symbolic links followed, is a regular file that lies in `folder`.

    The cache of the Hugging Face hub keeps `<repo>/snapshots/<revision>/x` as a link to `<repo>/blobs/<digest>`;
    such links are let through.

    Raises:
        FormatError: the file is missing, not a regular file, or lies elsewhere.
    """
    try:
        root, target = Path(os.path.realpath(folder)), Path(os.path.realpath(file, strict=True))
        mode = target.stat().st_mode
    except OSError as error:
        what = "file is missing or cannot be reached"
        raise FormatError(Problem(what=what, file=str(file), got=error.strerror or saying(error))) from error
    if not any(target.is_relative_to(home) for home in (root, *_blob_folders(root))):
        remedy = "put the file itself, or give the folder that really holds it"
        problem = Problem(
            what="path leaves the folder", file=str(file), expected=str(root), got=str(target), remedy=remedy
        )
        raise FormatError(problem)
    if not stat.S_ISREG(mode):
        raise FormatError(Problem(what="not a regular file", file=str(file)))


def _blob_folders(root: Path) -> Iterator[Path]:
    for revision in (root, *root.parents):
        if revision.parent.name == "snapshots":
            yield revision.parent.parent / "blobs"
            return
