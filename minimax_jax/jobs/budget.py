"""The memory that a job may take: what jax takes once, and as many units of work as run at a time."""

from __future__ import annotations

import heapq
import os
from collections.abc import Iterable, Iterator
from typing import Protocol

from minimax_jax.display import counted
from minimax_jax.errors import Problem, RequestError, argument

RUNTIME_BYTES = 256 * 2**20
"""What jax's compiled programs, threads and allocator take once, whatever the checkpoint (measured: 110 to 250 MB)."""

DEFAULT_WORKERS = max(2, min(8, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 2))
"""Threads where nobody says how many: one for each core that this process may use, at least 2 and at most 8."""

_WORKER_BYTES = 272 * 2**20
"""What a thread takes at most of the published model, whatever the work: its largest unit that cannot be split."""

LEAST_UNIT_BYTES = 2**20
"""Smaller units of work would be too many; a budget below this is refused."""

FOR_A_JOB = f"raise {argument('max_memory_bytes')}, or use fewer {argument('workers')}"
FOR_A_CALL = "raise max_memory_bytes, or use fewer workers"


class Work(Protocol):
    """What a budget knows of a unit of work."""

    @property
    def memory_bytes(self) -> int:
        """Peak memory of the unit."""


def require_workers(workers: int) -> None:
    """Raise a RequestError where there is nobody to work."""
    if workers < 1:
        raise RequestError(Problem(what="no workers", expected="at least 1", got=str(workers)))


def workers_within(max_memory_bytes: int) -> int:
    """Threads within a budget where nobody says how many: `DEFAULT_WORKERS`, or as many as it holds, at least 2."""
    return max(2, min(DEFAULT_WORKERS, share_bytes(max_memory_bytes, 1) // _WORKER_BYTES))


def share_bytes(max_memory_bytes: int, units: int) -> int:
    """What a budget leaves for each of `units` that run at a time; negative where it does not hold even jax."""
    return (max_memory_bytes - RUNTIME_BYTES) // units


def peak_bytes(units: Iterable[Work], workers: int) -> int:
    """Most memory over what the process has at the start: the largest units at a time, and what jax takes once."""
    return RUNTIME_BYTES + sum(heapq.nlargest(workers, (unit.memory_bytes for unit in units)))


def over_budget(
    unit_bytes: int,
    max_memory_bytes: int,
    workers: int,
    *,
    waiting: int = 0,
    key: str | None = None,
    remedy: str = FOR_A_JOB,
) -> Iterator[Problem]:
    """A problem where a budget does not hold the largest unit of work as often as it may be held.

    Args:
        unit_bytes: peak memory of the unit.
        max_memory_bytes: the budget.
        workers: how many units run at a time.
        waiting: how many more are held meanwhile.
        key: the tensor of the unit.
        remedy: how the caller gives the budget.
    """
    needed = RUNTIME_BYTES + (workers + waiting) * unit_bytes
    if needed > max_memory_bytes:
        expected = f"at least {needed:,} bytes with {counted(workers, 'worker')}"
        got = counted(max_memory_bytes, "byte")
        what = "memory budget too small for one unit of work"
        yield Problem(what=what, key=key, expected=expected, got=got, remedy=remedy)
