"""Reading the tensors of checkpoints whose files are not safetensors: each an array of which boxes can be had."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, Protocol

import numpy.typing as npt

from minimax_jax.io.files import FileState, as_bytes
from minimax_jax.io.header import TensorInfo
from minimax_jax.io.location import Location
from minimax_jax.io.reader import Reader
from minimax_jax.io.source import OpenFile


class Boxes(Protocol):
    """An array of a checkpoint."""

    def read_region(self, region: tuple[slice, ...]) -> npt.NDArray[Any]:
        """A box of it, a range with start and stop for each of the first axes, as a fresh array."""


class ArrayReader(Reader):
    """Reads tensors whose `file` is the checkpoint's folder and their name; they have no memory maps to be viewed."""

    @abstractmethod
    def boxes(self, info: TensorInfo) -> Boxes:
        """The array of a tensor."""

    def read_region(self, info: TensorInfo, region: tuple[slice, ...]) -> npt.NDArray[Any]:
        """A box of an array, as a fresh array; only what holds it is read."""
        with self._handles.use(info.file) as opened:
            return opened.boxes.read_region(region) if isinstance(opened, _Array) else super().read_region(info, region)

    def _open(self, file: Location) -> OpenFile:
        info = self.checkpoint.tensors[file.name]
        return _Array(self.boxes(info), info)


class _Array:
    """The bytes of one array in row-major order, as those of a file."""

    def __init__(self, boxes: Boxes, info: TensorInfo):
        self.boxes = boxes
        self.state = FileState(nbytes=info.nbytes, tag="array")
        self._shape = info.shape
        self._row_bytes = info.nbytes // (info.shape[0] if info.shape else 1)
        self._last: tuple[int, int, memoryview] = (0, 0, memoryview(b""))

    def read_into(self, start: int, buffer: memoryview) -> None:
        """Fill `buffer` from position `start` on, from the rows that hold it."""
        first = start // self._row_bytes
        stop = -(-(start + buffer.nbytes) // self._row_bytes)
        low, high, held = self._last  # short reads come one after another from the same rows
        if not low <= first < stop <= high:
            rows = self.boxes.read_region((slice(first, stop),) if self._shape else ())
            low, high, held = first, stop, as_bytes(rows)
            self._last = (low, high, held) if stop - first == 1 else self._last
        offset = start - low * self._row_bytes
        buffer[:] = held[offset : offset + buffer.nbytes]

    def require_unchanged(self) -> None:
        """Its reader looks after the files of all arrays at once."""

    def close(self) -> None:
        """Nothing is held open."""
