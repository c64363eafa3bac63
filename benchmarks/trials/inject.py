"""Faults put into a process: calls of the operating system that fail, and things that happen at a named moment."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from typing import Any

from minimax_jax.io import points


def failing(call: str, code: int, after: int) -> None:
    """Have a call of the operating system fail from some use of it on."""
    real, uses = getattr(os, call), [0]

    def fail(*arguments: Any) -> Any:
        uses[0] += 1
        if uses[0] > after:
            raise OSError(code, os.strerror(code))
        return real(*arguments)

    setattr(os, call, fail)


def once_at(moment: str, number: int, act: Callable[[], object]) -> None:
    """Do something when a named moment is reached for a certain time."""
    left = [number]
    lock = threading.Lock()

    def reached(name: str) -> None:
        with lock:
            left[0] -= name == moment
            due = name == moment and left[0] == 0
        if due:
            act()

    points.on_reach = reached
