"""A checkpoint of `torch.distributed.checkpoint` opened for work as any other; without torch."""

from __future__ import annotations

import functools
from collections.abc import Collection
from pathlib import Path

from minimax_jax.io import dcp
from minimax_jax.io.beside import LeftBehind
from minimax_jax.io.dcp_reader import DcpReader
from minimax_jax.io.jsonfile import shown
from minimax_jax.jobs.array_source import source_of_arrays
from minimax_jax.jobs.source import Source


def open_dcp(folder: Path, *, ignore: Collection[str], leave_out: Collection[str]) -> Source:
    """Open a checkpoint and check all of it but the values; `open_source` calls this.

    Its tensors have native names or those of Hugging Face, and were saved by any number of processes.

    Args:
        folder: where it is, with config.json in it.
        ignore: attributes of config.json to leave unread.
        leave_out: as in `open_source`: `optim`, where the states of an optimiser were saved with them.

    Returns:
        As `source_of_arrays`; what was saved and is no tensor is left behind.

    Raises:
        ConfigError: config.json is missing, malformed or describes something unsupported.
        FormatError: a damaged or incomplete checkpoint.
        LayoutError: the tensors are not those that the config asks for.
    """
    contents = dcp.describe(folder)
    return source_of_arrays(
        folder,
        [(key, tensor.dtype, tensor.shape) for key, tensor in contents.tensors.items()],
        contents.states,
        used=contents.states,
        open_reader=functools.partial(DcpReader, contents=contents),
        others=[LeftBehind(name=shown(name), what="no tensor") for name in contents.objects],
        ignore=ignore,
        leave_out=leave_out,
    )
