"""Processes that are forked from one server, which has imported once what they need; each pytest worker has its own.

A process so made is as good as a new one for whatever does not ask how an interpreter starts: no backend of JAX is
there and no thread runs before the fork.
"""

import multiprocessing
import os
from pathlib import Path

import pytest

PRELOADED = (
    *("from_hf_ranks", "to_hf_ranks", "storage_ranks"),
    *("member_process", "minimax_jax.cli", "minimax_jax.models.export"),
    *("minimax_jax.ops.kernels_numba", "orbax.checkpoint"),
)
"""All that is run in any of them, as there is one server, and who comes first starts it; what is not there is left."""

CONTEXT = multiprocessing.get_context("forkserver")


def start(function, *argument_lists):
    """Start a process of the function for each list of arguments."""
    with pytest.MonkeyPatch.context() as patch:
        # Python 3.11 gives the server no sys.path: without this one it imports nothing, and every process all of it.
        patch.setenv("PYTHONPATH", str(Path(__file__).parent), prepend=os.pathsep)
        CONTEXT.set_forkserver_preload([*PRELOADED])
        processes = [CONTEXT.Process(target=function, args=arguments) for arguments in argument_lists]
        for process in processes:
            process.start()
    return processes
