"""A few large files on disk at a time: each fetched when it is read, and deleted when others need its place."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from minimax_jax.io.files import FileState
from minimax_jax.io.location import Url
from minimax_jax.io.remote import RemoteFile
from minimax_jax.io.source import CachedFile

SMALL_BYTES = 2**20
"""A smaller read is no reason to fetch a file: jobs come back for the scales of a shard after all of its weights."""


@dataclass(kw_only=True, slots=True)
class _Slot:
    """One file: how many use it, and where it is on disk, if it is."""

    users: int = 0
    path: Path | None = None
    lock: threading.Lock = field(default_factory=threading.Lock)


class Shelf:
    """Files on disk, at most so many but for those in use, the latest used; safe to call from any number of threads."""

    def __init__(self, most: int, fetch: Callable[[Url], Path], delete: Callable[[Path], None]):
        """Start empty.

        Args:
            most: how many files to keep.
            fetch: brings a file to disk, and returns where it is.
            delete: takes it away from there.
        """
        self._most = most
        self._fetch = fetch
        self._delete = delete
        self._slots: OrderedDict[Url, _Slot] = OrderedDict()
        self._lock = threading.Lock()

    def has(self, file: Url) -> bool:
        """Whether the file is on disk now."""
        with self._lock:
            return file in self._slots and self._slots[file].path is not None

    @contextmanager
    def use(self, file: Url) -> Iterator[Path]:
        """A context in which the file is on disk."""
        with self._lock:
            slot = self._slots.setdefault(file, _Slot())
            self._slots.move_to_end(file)
            slot.users += 1
        try:
            with slot.lock:
                if slot.path is None:
                    self._make_room()
                    slot.path = self._fetch(file)
            yield slot.path
        finally:
            with self._lock:
                slot.users -= 1

    def drop(self, file: Url) -> None:
        """Delete the file from disk, unless it is in use or was not there."""
        with self._lock:
            if file in self._slots and self._slots[file].users == 0:
                self._remove(file)

    def _make_room(self) -> None:
        with self._lock:
            idle = [file for file, slot in self._slots.items() if slot.users == 0]
            for file in idle[: max(0, len(self._slots) - self._most)]:
                self._remove(file)

    def _remove(self, file: Url) -> None:
        path = self._slots.pop(file).path
        if path is not None:
            self._delete(path)


class ShelvedFile:
    """A file read through a shelf; see `source.OpenFile`."""

    def __init__(self, far: RemoteFile, shelf: Shelf):
        """Fetch nothing yet; `far` is the same file on its server."""
        self._far = far
        self._shelf = shelf

    @property
    def state(self) -> FileState:
        """The state in which its bytes are valid."""
        return self._far.state

    def read_into(self, start: int, buffer: memoryview) -> None:
        """Fill `buffer` from disk; a small part of a file that is not there, from its server."""
        if buffer.nbytes < SMALL_BYTES and not self._shelf.has(self._far.file):
            self._far.read_into(start, buffer)
            return
        with self._shelf.use(self._far.file) as path:
            near = CachedFile(self._far.file, path, self.state)
            try:
                near.read_into(start, buffer)
            finally:
                near.close()

    def require_unchanged(self) -> None:
        """Files that go onto a shelf are those of a commit, which do not change."""

    def close(self) -> None:
        """Take it off the shelf."""
        self._far.close()
        self._shelf.drop(self._far.file)
