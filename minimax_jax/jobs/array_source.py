"""A checkpoint in other files than safetensors, opened for work: its arrays and config, and that they fit."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path

from minimax_jax.io.beside import LeftBehind, left_behind
from minimax_jax.io.checkpoint import Checkpoint
from minimax_jax.io.files import FileState
from minimax_jax.io.header import TensorInfo
from minimax_jax.io.location import Location
from minimax_jax.io.reader import Reader
from minimax_jax.jobs.left_out import set_aside
from minimax_jax.jobs.source import Source
from minimax_jax.layout.check import survey
from minimax_jax.layout.config import MiniMaxConfig
from minimax_jax.layout.specs import TensorSpec


def source_of_arrays(
    folder: Path,
    arrays: Iterable[tuple[str, str, tuple[int, ...]]],
    states: Mapping[Location, FileState],
    *,
    used: Iterable[Location],
    open_reader: Callable[[Checkpoint], Reader],
    others: Iterable[LeftBehind] = (),
    ignore: Collection[str],
    leave_out: Collection[str],
) -> Source:
    """A source as any other; the file of a tensor is the checkpoint's folder and its name.

    Args:
        folder: the checkpoint, with config.json in it.
        arrays: name, dtype (by format name) and shape of each.
        states: what its files were.
        used: its files or folders of weights.
        open_reader: makes the reader of its arrays.
        others: what was saved beside them.
        ignore: attributes of config.json to leave unread.
        leave_out: as in `open_source`.

    Raises:
        ConfigError: config.json is missing, malformed or describes something unsupported.
        LayoutError: the arrays are not those that the config asks for.
    """
    config = MiniMaxConfig.from_pretrained(folder, ignore=ignore)
    tensors = {key: _info(folder, TensorSpec(key, shape, dtype)) for key, dtype, shape in arrays}
    checkpoint = Checkpoint(path=folder, tensors=tensors, metadata={}, files=(), index_file=None, states=states)
    checkpoint, left_out = set_aside(checkpoint, config, leave_out)
    return Source(
        path=folder,
        checkpoint=checkpoint,
        config=config,
        survey=survey(checkpoint.tensors, config),
        sidecar={},
        left_out=left_out,
        left_behind=(*left_behind(folder, used), *others),
        open_reader=open_reader,
    )


def _info(folder: Path, spec: TensorSpec) -> TensorInfo:
    return TensorInfo(
        key=spec.key, dtype=spec.dtype, shape=spec.shape, file=folder / spec.key, start=0, stop=spec.nbytes
    )
