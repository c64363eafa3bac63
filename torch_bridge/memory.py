"""A word with glibc about memory that tensors leave behind."""

from __future__ import annotations

import ctypes
import functools
import sys


def return_freed() -> None:
    """Give freed memory back to the system; by itself, glibc keeps what tensors of a few MiB leave behind."""
    libc = _libc()
    if libc is not None:
        libc.malloc_trim(ctypes.c_size_t(0))


@functools.cache
def _libc() -> ctypes.CDLL | None:
    """The C library, if it is glibc."""
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    return libc if hasattr(libc, "malloc_trim") else None
