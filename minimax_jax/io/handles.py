"""Open files that threads share."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Generic, TypeVar

from minimax_jax.errors import JobError, Problem

_File = TypeVar("_File")
_Handle = TypeVar("_Handle")


class Handles(Generic[_File, _Handle]):
    """Handles of files, opened on first use and closed together, but never while a thread still uses one.

    A descriptor closed under a running call could be handed out again for another file, and the call would go on there.
    """

    def __init__(self, open_file: Callable[[_File], _Handle], close: Callable[[Any], object] = os.close):
        """Start with no file open.

        Args:
            open_file: opens one and returns its handle.
            close: closes a handle; by default that of a file descriptor.
        """
        self._open_file = open_file
        self._close = close
        self._handles: dict[_File, _Handle] = {}
        self._uses = 0
        self._closed = False
        self._idle = threading.Condition()

    @contextmanager
    def use(self, file: _File) -> Iterator[_Handle]:
        """A context in which the handle of `file` is open.

        Raises:
            JobError: `close` was called before.
        """
        with self._idle:
            if self._closed:
                raise JobError(Problem(what="reader or writer is already closed", file=str(file)))
            if file not in self._handles:
                self._handles[file] = self._open_file(file)
            handle = self._handles[file]
            self._uses += 1
        try:
            yield handle
        finally:
            with self._idle:
                self._uses -= 1
                self._idle.notify_all()

    def opened(self) -> list[_Handle]:
        """The handles that are open now."""
        with self._idle:
            return list(self._handles.values())

    def close(self) -> None:
        """Let no new use begin, wait for those under way, and close all files; may be called again."""
        with self._idle:
            self._closed = True
            self._idle.wait_for(lambda: self._uses == 0)
            while self._handles:
                self._close(self._handles.popitem()[1])
