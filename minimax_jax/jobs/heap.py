"""Giving memory back to the system.

glibc keeps what was freed for later, in pieces: with buffers of many sizes on several threads the process comes to hold
twice what is in use (measured through XLA: 460 MB against 270), and the more, the longer it runs.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable

_WORTH_BYTES = 16 * 2**20
"""Below this the search for free pages costs more than they are worth."""


def give_back(freed_bytes: int) -> None:
    """Return free pages to the system after about `freed_bytes` have been freed; does nothing without glibc."""
    if freed_bytes >= _WORTH_BYTES:
        _trim()(0)


@functools.cache
def _trim() -> Callable[[int], int]:
    trim: Callable[[int], int] = getattr(ctypes.CDLL(None), "malloc_trim", int)
    return trim
