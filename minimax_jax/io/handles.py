"""Open files that threads share."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from minimax_jax.errors import JobError, Problem


class Handles:
    """File descriptors, opened on first use and closed together, but never while a thread still uses one.

    A descriptor closed under a running call could be handed out again for another file, and the call would go on there.
    """

    def __init__(self, open_file: Callable[[Path], int]):
        """Start with no file open; `open_file` opens one and returns its descriptor."""
        self._open_file = open_file
        self._fds: dict[Path, int] = {}
        self._uses = 0
        self._closed = False
        self._idle = threading.Condition()

    @contextmanager
    def use(self, file: Path) -> Iterator[int]:
        """A context in which the descriptor of `file` is open.

        Raises:
            JobError: `close` was called before.
        """
        with self._idle:
            if self._closed:
                raise JobError(Problem(what="reader or writer is already closed", file=str(file)))
            if file not in self._fds:
                self._fds[file] = self._open_file(file)
            fd = self._fds[file]
            self._uses += 1
        try:
            yield fd
        finally:
            with self._idle:
                self._uses -= 1
                self._idle.notify_all()

    def close(self) -> None:
        """Let no new use begin, wait for those under way, and close all files; may be called again."""
        with self._idle:
            self._closed = True
            self._idle.wait_for(lambda: self._uses == 0)
            while self._fds:
                os.close(self._fds.popitem()[1])
