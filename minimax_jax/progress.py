"""How far a long job is."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Progress:
    """A moment of a job.

    Attributes:
        done_bytes: bytes read so far.
        total_bytes: of how many.
        seconds: time since it began.
        step: what is done after the job itself, which counts from nothing: `certify`; None for the job.
    """

    done_bytes: int
    total_bytes: int
    seconds: float
    step: str | None = None


class Ticker:
    """Counts bytes and tells a listener after each step."""

    def __init__(self, total_bytes: int, listener: Callable[[Progress], None] | None):
        self._listener = listener
        self._total_bytes = total_bytes
        self._done_bytes = 0
        self._started = time.monotonic()

    @property
    def seconds(self) -> float:
        """Time since the job began."""
        return time.monotonic() - self._started

    def tick(self, nbytes: int) -> None:
        """`nbytes` more have been read."""
        self._done_bytes += nbytes
        if self._listener is not None:
            moment = Progress(done_bytes=self._done_bytes, total_bytes=self._total_bytes, seconds=self.seconds)
            self._listener(moment)
