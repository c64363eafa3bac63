"""The processes that share a job."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass

from minimax_jax.errors import JobError, Problem


def _go_on(name: str) -> None:
    """Wait for nobody."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Team:
    """Who shares a job, seen by one of them. All of them see the same files.

    Attributes:
        index: which of them this process is; 0 leads.
        count: how many they are.
        wait: waits until all of them have come to the moment of this name.
    """

    index: int = 0
    count: int = 1
    wait: Callable[[str], None] = _go_on

    @property
    def leads(self) -> bool:
        """Whether this process makes the destination, and finishes it."""
        return self.index == 0


SOLO = Team()


def distributed_team() -> Team:
    """The processes of `jax.distributed`, which is initialised if it is not yet.

    Its own means tell who takes part: the launcher (Slurm, MPI, GKE, Cloud TPU). Without a launcher, these variables
    do: `JAX_COORDINATOR_ADDRESS`, which jax reads, and `JAX_NUM_PROCESSES` and `JAX_PROCESS_ID`, which are passed on.

    Raises:
        JobError: they tell nothing.
    """
    import jax
    from jax.experimental import multihost_utils

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
    return Team(index=jax.process_index(), count=jax.process_count(), wait=multihost_utils.sync_global_devices)


def _number(text: str | None) -> int | None:
    return None if text is None else int(text)
