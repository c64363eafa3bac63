"""The processes that share a job."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from minimax_jax.errors import JobError, Problem

FAILED = ".failed"
"""The file in a workshop by which a process tells the others that it cannot go on."""

_FAILS = -1
"""Told in place of a length."""


class PeerFailed(JobError):
    """Another process of the team has failed, and says itself why."""


def _alone(told: bytes | None) -> list[bytes] | None:
    return None if told is None else [told]


@dataclass(frozen=True, kw_only=True, slots=True)
class Team:
    """Who shares a job, seen by one of them. All of them see the same files.

    Attributes:
        index: which of them this process is; 0 leads.
        count: how many they are.
        gather: waits for all of them to call it; what each of them told, in their order, or None where one of them told
            None: that it fails.
    """

    index: int = 0
    count: int = 1
    gather: Callable[[bytes | None], list[bytes] | None] = _alone

    @property
    def leads(self) -> bool:
        """Whether this process makes the destination, and finishes it."""
        return self.index == 0

    def wait(self) -> None:
        """Wait until all of them have come so far.

        Raises:
            PeerFailed: one of them will not.
        """
        self.share(b"")

    def share(self, told: bytes) -> list[bytes]:
        """As `wait`; what each of them tells the others, in their order."""
        with uninterrupted():
            found = self.gather(told)
            if found is None:  # whoever is told so takes part in nothing more, stopped meanwhile or not
                raise _peer_failed()
        return found

    @contextmanager
    def leader_first(self) -> Iterator[None]:
        """A context that the leader passes through before any other enters it.

        Raises:
            PeerFailed: another process failed.
        """
        if not self.leads:
            self.wait()
        yield
        if self.leads:
            self.wait()

    def require_all_well(self, workshop: Path) -> None:
        """Raise a PeerFailed if another process has said that it cannot go on."""
        if self.count > 1 and (workshop / FAILED).exists():
            self.wait()  # in which that process waits for all others, and for an answer

    @contextmanager
    def standing_together(self, workshop: Path) -> Iterator[None]:
        """A context that all of them leave together; by an error when one does, soon and without a deadlock."""
        try:
            yield
        except PeerFailed:
            raise
        except BaseException:
            if self.count > 1:
                with suppress(OSError):
                    (workshop / FAILED).touch()
                with uninterrupted():
                    self.gather(None)
            raise
        self.wait()  # who is stopped while it waits here leaves nobody waiting


SOLO = Team()


@contextmanager
def uninterrupted() -> Iterator[None]:
    """A context at whose end Ctrl-C and SIGTERM take effect: none may leave the others alone in a collective.

    In a thread other than the main one it changes nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    caught: list[int] = []
    kept = [(number, signal.getsignal(number)) for number in (signal.SIGINT, signal.SIGTERM)]
    for number, _ in kept:
        signal.signal(number, lambda number, _: caught.append(number))
    try:
        yield
    finally:
        for number, handler in kept:
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
    if caught:
        signal.raise_signal(caught[0])


def present_team() -> Team:
    """The processes that jax knows of by now: those of `jax.distributed`, or this one alone."""
    import jax

    if jax.process_count() == 1:
        return SOLO
    return Team(index=jax.process_index(), count=jax.process_count(), gather=_gather)


def distributed_team() -> Team:
    """The processes of `jax.distributed`, which is initialised if it is not yet.

    Its own means tell who takes part: the launcher (Slurm, MPI, GKE, Cloud TPU). Without a launcher, these variables
    do: `JAX_COORDINATOR_ADDRESS`, which jax reads, and `JAX_NUM_PROCESSES` and `JAX_PROCESS_ID`, which are passed on.

    Raises:
        JobError: they tell nothing.
    """
    import jax

    if not jax.distributed.is_initialized():
        count, index = (os.environ.get(name) for name in ("JAX_NUM_PROCESSES", "JAX_PROCESS_ID"))
        try:
            jax.distributed.initialize(num_processes=_number(count), process_id=_number(index))
        except (ValueError, RuntimeError) as error:
            remedy = (
                "start it under Slurm, MPI or GKE, or set JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES, JAX_PROCESS_ID"
            )
            problem = Problem(what="no group of processes can be formed", got=str(error), remedy=remedy)
            raise JobError(problem) from error
    return Team(index=jax.process_index(), count=jax.process_count(), gather=_gather)


def _number(text: str | None) -> int | None:
    return None if text is None else int(text)


def _gather(told: bytes | None) -> list[bytes] | None:
    """`Team.gather` by collectives of jax: first how long each text is, then the texts, where there are any."""
    from jax.experimental.multihost_utils import process_allgather

    lengths = process_allgather(np.int32(_FAILS if told is None else len(told)))
    if told is None or lengths.min() == _FAILS:
        return None
    if not lengths.any():
        return [b""] * len(lengths)
    padded = np.zeros(lengths.max(), np.uint8)
    padded[: len(told)] = np.frombuffer(told, np.uint8)
    rows = process_allgather(padded)
    return [row[:length].tobytes() for row, length in zip(rows, lengths, strict=True)]


def _peer_failed() -> PeerFailed:
    what, remedy = "another process of the team failed", "see what it says, then run the same command again"
    return PeerFailed(Problem(what=what, remedy=remedy))
