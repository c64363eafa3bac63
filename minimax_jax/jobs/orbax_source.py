"""An Orbax checkpoint opened for work, as any other: its arrays, its config, and the proof that they fit each other."""

from __future__ import annotations

import hashlib
from collections.abc import Collection
from pathlib import Path

from minimax_jax.errors import FormatError, Problem
from minimax_jax.io import orbax
from minimax_jax.io.array_reader import ArrayReader
from minimax_jax.io.files import FileState
from minimax_jax.io.header import TensorInfo
from minimax_jax.io.orbax_rows import Rows
from minimax_jax.jobs.array_source import source_of_arrays
from minimax_jax.jobs.source import Source
from minimax_jax.paths import path_of


def open_orbax(path: str | Path, *, ignore: Collection[str] = (), leave_out: Collection[str] = ()) -> Source:
    """Open an Orbax checkpoint and check all of it but the values; `open_source` calls this.

    Its tree is native and flat, or MaxText's.

    Args:
        path: the folder, with config.json in it.
        ignore: attributes of config.json to leave unread.
        leave_out: as in `open_source`.

    Returns:
        As `source_of_arrays`.

    Raises:
        ConfigError: config.json is missing, malformed or describes something unsupported.
        FormatError: not an Orbax checkpoint of one tree, or an incomplete one.
        LayoutError: the arrays are not those that the config asks for.
        JobError: Orbax is not installed.
    """
    folder = path_of(path)
    arrays = orbax.describe(folder)
    return source_of_arrays(
        folder,
        [(array.key, array.dtype, array.shape) for array in arrays.values()],
        {folder: _state(folder)},
        used=orbax.trees(folder),
        open_reader=OrbaxReader,
        ignore=ignore,
        leave_out=leave_out,
    )


class OrbaxReader(ArrayReader):
    """Reads the arrays of an Orbax checkpoint that `open_orbax` has opened."""

    def boxes(self, info: TensorInfo) -> Rows:
        """An array, through TensorStore."""
        return Rows(Path(str(self.checkpoint.path)), info.key)

    def require_unchanged(self) -> None:
        """Check that no file of the checkpoint was written to, replaced or lost meanwhile; raises a FormatError."""
        for folder, state in self.checkpoint.states.items():
            if _state(Path(str(folder))) != state:
                what, remedy = "checkpoint was changed after it was opened", "leave it alone, and start again"
                raise FormatError(Problem(what=what, file=str(folder), remedy=remedy))


def _state(folder: Path) -> FileState:
    """The state of all files of a checkpoint as one."""
    files = [(str(file), FileState.at(file)) for file in sorted(folder.rglob("*")) if file.is_file()]
    listed = "\n".join(f"{name}: {state}" for name, state in files)
    digest = hashlib.sha256(listed.encode()).hexdigest()
    return FileState(nbytes=sum(state.nbytes for _, state in files), tag=f"files {digest[:16]}")
