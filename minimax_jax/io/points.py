"""Named moments of a job: what a test hangs onto to kill it there, or to make it fail."""

from __future__ import annotations

from collections.abc import Callable

on_reach: Callable[[str], None] | None = None
"""Called with the name of each moment that is reached; nothing but tests sets it."""


def reach(name: str) -> None:
    """Say that a moment is reached."""
    if on_reach is not None:
        on_reach(name)
