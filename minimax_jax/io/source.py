"""Where bytes come from: a file of this machine, or one behind a URL. What is above asks here, and knows neither.

A file is pinned by its state when it is first looked at. Reading it later in another state is an error.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Protocol

from minimax_jax import paths
from minimax_jax.errors import FormatError, JobError, Problem
from minimax_jax.io.files import FileState, io_errors, open_regular, read_exactly, short_file, sync_file
from minimax_jax.io.location import WEB_SCHEMES, Location, Url

_PIECE_BYTES = 2**24
_FILE_ENDS = (".safetensors", ".json")


class OpenFile(Protocol):
    """A file to read from; its methods may be called from any number of threads."""

    @property
    def state(self) -> FileState:
        """The state in which its bytes are valid."""

    def read_into(self, start: int, buffer: memoryview) -> None:
        """Fill `buffer` with the bytes from position `start` on, or raise a FormatError: never less, never others."""

    def require_unchanged(self) -> None:
        """Raise a FormatError if the file is not in that state any more."""

    def close(self) -> None:
        """Let go of it."""


class Store(Protocol):
    """A kind of place that URLs point to."""

    def pin(self, url: Url) -> Location:
        """The same place with what may move under its name resolved; a local path where it turns out to be one."""

    def names(self, folder: Url) -> list[str] | None:
        """Names of the files in a folder, sorted; None where it cannot be listed."""

    def folders(self, folder: Url) -> list[str]:
        """Names of the folders in a folder, as far as that is told."""

    def look(self, file: Url) -> FileState:
        """The state of a file now; raises a FileNotFoundError where there is none."""

    def open(self, file: Url, pinned: FileState, *, data: bool) -> OpenFile:
        """A file to read from; `data` says that much of it will be read, not its header alone."""


class LocalFile:
    """A file of this machine that is open."""

    def __init__(self, file: Path, pinned: FileState | None = None):
        """Open it.

        Args:
            file: a regular file.
            pinned: the state that it has to be in; None takes it as it is.

        Raises:
            FormatError: it is missing, unreadable, not a regular file, or in another state.
        """
        self.file = file
        self.fd = open_regular(file)
        self.state = self._near = FileState.of(self.fd)
        if pinned is None or pinned == self.state:
            return
        self.close()
        require_state(file, pinned, self.state)

    def read_into(self, start: int, buffer: memoryview) -> None:
        """Fill `buffer`; see `OpenFile`."""
        read_exactly(self.fd, self.file, start, buffer)

    def require_unchanged(self) -> None:
        """Raise a FormatError where the file has shrunk, or was written to; see `OpenFile`."""
        require_state(self.file, self._near, FileState.of(self.fd))

    def close(self) -> None:
        """Close the descriptor."""
        os.close(self.fd)


class CachedFile(LocalFile):
    """A file of this machine that is a copy of one on a server, and stands for that."""

    def __init__(self, file: Location, copy: Path, state: FileState):
        """Open it.

        Args:
            file: the original.
            copy: where it is on this machine.
            state: that of the original; the copy must have its size.

        Raises:
            FormatError: as `LocalFile`; the copy has another size.
        """
        super().__init__(copy)
        self.state = state
        got = self._near.nbytes
        if got == state.nbytes:
            return
        self.close()
        what, remedy = "file in the cache is not that of the server", "delete it from the cache"
        expected, found = f"{state.nbytes:,} bytes", f"{got:,} bytes in {copy}"
        raise FormatError(Problem(what=what, file=str(file), expected=expected, got=found, remedy=remedy))


def require_state(file: Location, pinned: FileState, now: FileState) -> None:
    """Check that a file is what it was.

    Raises:
        FormatError: it is not.
    """
    if now.nbytes < pinned.nbytes:
        raise FormatError(short_file(file, expected_bytes=pinned.nbytes, got_bytes=now.nbytes))
    if now != pinned:
        what, remedy = "file was changed or replaced after it was opened", "let nothing write to it, and start again"
        raise FormatError(Problem(what=what, file=str(file), expected=str(pinned), got=str(now), remedy=remedy))


def pin(place: Location) -> Location:
    """The same place with what may move under its name, such as a branch, resolved.

    Raises:
        FormatError: there is no such place, it cannot be reached, or what its kind takes is not installed.
        RequestError: no file can have such a name.
    """
    paths.require_nameable(str(place))
    return place if isinstance(place, Path) else _store(place).pin(place)


def is_folder(place: Location) -> bool:
    """Whether a place is a folder. URLs are told by their ends: servers have no folders, only names."""
    return paths.is_folder(place) if isinstance(place, Path) else not place.name.endswith(_FILE_ENDS)


def folders(folder: Location) -> list[Location]:
    """The folders in one that is elsewhere, hidden ones left out, as far as that is told: `listed` has files alone.

    Raises:
        FormatError: the folder cannot be listed.
    """
    if isinstance(folder, Path):
        return []
    with io_errors(FormatError, "folder cannot be listed", folder):
        return [folder / name for name in _store(folder).folders(folder) if not name.startswith(".")]


def listed(folder: Location) -> list[Location] | None:
    """What lies in a folder, sorted, hidden things left out; of one elsewhere, files; None where that is not told.

    Raises:
        FormatError: the folder cannot be listed.
    """
    with io_errors(FormatError, "folder cannot be listed", folder):
        if isinstance(folder, Path):
            return sorted(file for file in folder.iterdir() if not file.name.startswith("."))
        names = _store(folder).names(folder)
    return None if names is None else [folder / name for name in names if not name.startswith(".")]


def exists(file: Location) -> bool:
    """Whether there is such a file; for a local one also whether there is a broken link.

    Raises:
        FormatError: that cannot be told.
    """
    if isinstance(file, Path):
        return os.path.lexists(file)
    try:
        _store(file).look(file)
    except FileNotFoundError:
        return False
    return True


def open_file(file: Location, pinned: FileState | None = None, *, data: bool = False) -> OpenFile:
    """Open a file.

    Args:
        file: a regular file, or a URL.
        pinned: the state that it has to be in; None takes it as it is.
        data: whether much of it will be read, not its header alone: where that pays, it is then fetched as a whole.

    Raises:
        FormatError: it is missing, cannot be read, or is in another state.
    """
    if isinstance(file, Path):
        return LocalFile(file, pinned)
    store = _store(file)
    with io_errors(FormatError, "file cannot be opened", file):
        return store.open(file, pinned or store.look(file), data=data)


def read_whole(file: Location, *, most_bytes: int, what: str) -> bytes:
    """All bytes of a small file.

    Args:
        file: a regular file, or a URL.
        most_bytes: a longer one is refused.
        what: what it is, for the message.

    Raises:
        FormatError: it is missing, cannot be read, or is too long.
    """
    opened = open_file(file)
    try:
        if opened.state.nbytes > most_bytes:
            expected, got = f"at most {most_bytes:,} bytes", f"{opened.state.nbytes:,} bytes"
            raise FormatError(Problem(what=f"{what} too long", file=str(file), expected=expected, got=got))
        content = bytearray(opened.state.nbytes)
        opened.read_into(0, memoryview(content))
    finally:
        opened.close()
    return bytes(content)


def copy_file(file: Location, copy: Path) -> None:
    """Copy a file to this machine, where nothing stands in its way; the copy survives a power cut.

    Args:
        file: a regular file, or a URL.
        copy: where to.

    Raises:
        FormatError: it cannot be read.
        JobError: the copy cannot be written; a local file cannot be copied.
    """
    if isinstance(file, Path):
        with io_errors(JobError, "side file cannot be copied", file):
            shutil.copyfile(file, copy)
        sync_file(copy)
        return
    opened = open_file(file)
    try:
        with io_errors(JobError, "side file cannot be copied", copy), copy.open("wb") as stream:
            for start in range(0, opened.state.nbytes, _PIECE_BYTES):
                piece = bytearray(min(_PIECE_BYTES, opened.state.nbytes - start))
                opened.read_into(start, memoryview(piece))
                stream.write(piece)
        sync_file(copy)
    finally:
        opened.close()


def require_within(file: Location, folder: Location) -> None:
    """Check that a file lies in a folder: see `paths.require_inside`. Names on a server lead nowhere else.

    Raises:
        FormatError: it is missing, not a regular file, or lies elsewhere.
    """
    if isinstance(file, Path) and isinstance(folder, Path):
        paths.require_inside(file, folder)


def _store(url: Url) -> Store:
    if url.scheme in WEB_SCHEMES:
        from minimax_jax.io.web import Web

        return Web()
    if url.scheme == "hf":
        from minimax_jax.io.hub import Hub

        return Hub()
    from minimax_jax.io.objects import Objects

    return Objects()
