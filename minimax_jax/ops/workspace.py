"""Memory that the results of kernels lie in, again and again: pages that are fresh cost more than the kernels do."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeAlias

import numpy as np

HostArray: TypeAlias = np.ndarray[Any, Any]

ALIGNMENT_BYTES = 64
"""Of host memory that jax takes over without a copy, and of the lines of a processor's cache."""

_active: ContextVar[Workspace | None] = ContextVar("workspace", default=None)


class Workspace:
    """Memory of one thread. Pages of it are taken from the system when they are first used, and then kept."""

    def __init__(self, nbytes: int):
        """Room for `nbytes` at a time."""
        self._raw = fresh((nbytes,), np.uint8)
        self._used = 0

    def empty(self, shape: tuple[int, ...], dtype: Any) -> HostArray:
        """A piece of it, aligned, whose contents are undefined; fresh memory where no room is left."""
        nbytes = math.prod(shape) * np.dtype(dtype).itemsize
        start = self._used
        if start + nbytes > self._raw.nbytes:
            return fresh(shape, dtype)
        self._used = -(-(start + nbytes) // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
        piece: HostArray = self._raw[start : start + nbytes].view(dtype).reshape(shape)
        return piece

    @contextmanager
    def holding(self) -> Iterator[None]:
        """A context in which results of kernels lie here, as numpy arrays, and this thread alone makes them.

        What lies here at its end is overwritten in the next one.
        """
        token = _active.set(self)
        try:
            yield
        finally:
            _active.reset(token)
            self._used = 0


class Workspaces:
    """A workspace for each thread, made when it first asks for its own."""

    def __init__(self, nbytes: int):
        """Of `nbytes` each."""
        self._nbytes = nbytes
        self._threads = threading.local()

    def mine(self) -> Workspace:
        """This thread's."""
        if not hasattr(self._threads, "workspace"):
            self._threads.workspace = Workspace(self._nbytes)
        mine: Workspace = self._threads.workspace
        return mine


def active() -> Workspace | None:
    """The workspace that holds what this thread makes."""
    return _active.get()


def empty(shape: tuple[int, ...], dtype: Any) -> HostArray:
    """Memory for a result: of the active workspace, or fresh."""
    workspace = _active.get()
    return fresh(shape, dtype) if workspace is None else workspace.empty(shape, dtype)


def fresh(shape: tuple[int, ...], dtype: Any) -> HostArray:
    """Memory that jax can take over without a copy."""
    nbytes = math.prod(shape) * np.dtype(dtype).itemsize
    raw: HostArray = np.empty(nbytes + ALIGNMENT_BYTES, np.uint8)
    start = -raw.ctypes.data % ALIGNMENT_BYTES
    array: HostArray = raw[start : start + nbytes].view(dtype).reshape(shape)
    return array
