"""An Orbax checkpoint opened for work, as any other: its arrays, its config, and the proof that they fit each other."""

from __future__ import annotations

import hashlib
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy.typing as npt

from minimax_jax.errors import FormatError, Problem
from minimax_jax.io import orbax
from minimax_jax.io.beside import left_behind
from minimax_jax.io.checkpoint import Checkpoint
from minimax_jax.io.files import FileState, as_bytes
from minimax_jax.io.header import TensorInfo
from minimax_jax.io.location import Location
from minimax_jax.io.orbax_rows import Rows
from minimax_jax.io.reader import Reader
from minimax_jax.io.source import OpenFile
from minimax_jax.jobs.left_out import set_aside
from minimax_jax.jobs.source import Source
from minimax_jax.layout.check import survey
from minimax_jax.layout.config import MiniMaxConfig
from minimax_jax.layout.specs import TensorSpec
from minimax_jax.paths import path_of


def open_orbax(path: str | Path, *, ignore: Collection[str] = (), leave_out: Collection[str] = ()) -> Source:
    """Open an Orbax checkpoint and check all of it but the values; `open_source` calls this.

    Its tree is native and flat, or MaxText's.

    Args:
        path: the folder, with config.json in it.
        ignore: attributes of config.json to leave unread.
        leave_out: as in `open_source`.

    Returns:
        A source as any other; the file of a tensor is the checkpoint's folder and its name.

    Raises:
        ConfigError: config.json is missing, malformed or describes something unsupported.
        FormatError: not an Orbax checkpoint of one tree, or an incomplete one.
        LayoutError: the arrays are not those that the config asks for.
        JobError: Orbax is not installed.
    """
    folder = path_of(path)
    arrays = orbax.describe(folder)
    config = MiniMaxConfig.from_pretrained(folder, ignore=ignore)
    tensors = {key: _info(array) for key, array in arrays.items()}
    states: dict[Location, FileState] = {folder: _state(folder)}
    checkpoint = Checkpoint(path=folder, tensors=tensors, metadata={}, files=(), index_file=None, states=states)
    checkpoint, left_out = set_aside(checkpoint, config, leave_out)
    checked = survey(checkpoint.tensors, config)
    return Source(
        path=folder,
        checkpoint=checkpoint,
        config=config,
        survey=checked,
        sidecar={},
        left_out=left_out,
        left_behind=left_behind(folder, orbax.trees(folder)),
        open_reader=OrbaxReader,
    )


class OrbaxReader(Reader):
    """Reads the arrays of an Orbax checkpoint that `open_orbax` has opened; they have no memory maps to be viewed."""

    def _open(self, file: Location) -> OpenFile:
        info = self.checkpoint.tensors[file.name]
        return _Array(Rows(Path(str(self.checkpoint.path)), info.key), info)

    def read_region(self, info: TensorInfo, region: tuple[slice, ...]) -> npt.NDArray[Any]:
        """A box of an array, as a fresh array; only the chunks that hold it are read."""
        with self._handles.use(info.file) as opened:
            return opened.read_region(region) if isinstance(opened, _Array) else super().read_region(info, region)

    def require_unchanged(self) -> None:
        """Check that no file of the checkpoint was written to, replaced or lost meanwhile; raises a FormatError."""
        for folder, state in self.checkpoint.states.items():
            if _state(Path(str(folder))) != state:
                what, remedy = "checkpoint was changed after it was opened", "leave it alone, and start again"
                raise FormatError(Problem(what=what, file=str(folder), remedy=remedy))


class _Array:
    """The bytes of one array in row-major order, as those of a file."""

    def __init__(self, rows: Rows, info: TensorInfo):
        self.state = FileState(nbytes=info.nbytes, tag="Orbax")
        self._rows, self._shape = rows, info.shape
        self._row_bytes = info.nbytes // (info.shape[0] if info.shape else 1)
        self._last: tuple[int, int, memoryview] = (0, 0, memoryview(b""))

    def read_into(self, start: int, buffer: memoryview) -> None:
        """Fill `buffer` from position `start` on, from the rows that hold it."""
        first = start // self._row_bytes
        stop = -(-(start + buffer.nbytes) // self._row_bytes)
        low, high, held = self._last  # short reads come one after another from the same rows
        if not low <= first < stop <= high:
            rows = self._rows.read(first, stop) if self._shape else self._rows.read_region(())
            low, high, held = first, stop, as_bytes(rows)
            self._last = (low, high, held) if stop - first == 1 else self._last
        offset = start - low * self._row_bytes
        buffer[:] = held[offset : offset + buffer.nbytes]

    def read_region(self, region: tuple[slice, ...]) -> npt.NDArray[Any]:
        """A box of it."""
        return self._rows.read_region(region)

    def require_unchanged(self) -> None:
        """Its reader looks after the files of all arrays at once."""

    def close(self) -> None:
        """Nothing is held open."""


def _state(folder: Path) -> FileState:
    """The state of all files of a checkpoint as one."""
    files = [(str(file), FileState.at(file)) for file in sorted(folder.rglob("*")) if file.is_file()]
    listed = "\n".join(f"{name}: {state}" for name, state in files)
    digest = hashlib.sha256(listed.encode()).hexdigest()
    return FileState(nbytes=sum(state.nbytes for _, state in files), tag=f"files {digest[:16]}")


def _info(array: orbax.Stored) -> TensorInfo:
    nbytes = TensorSpec(array.key, array.shape, array.dtype).nbytes
    return TensorInfo(
        key=array.key, dtype=array.dtype, shape=array.shape, file=array.file / array.key, start=0, stop=nbytes
    )
