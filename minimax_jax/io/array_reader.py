"""Reading the tensors of checkpoints whose files are not safetensors: each an array of which boxes can be had."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from minimax_jax.io.files import FileState
from minimax_jax.io.header import TensorInfo
from minimax_jax.io.location import Location
from minimax_jax.io.reader import Reader
from minimax_jax.io.source import OpenFile


class Boxes(Protocol):
    """An array of a checkpoint."""

    def read_region(self, region: tuple[slice, ...]) -> npt.NDArray[Any]:
        """A box of it, a range with start and stop for each of the first axes, as a fresh array."""

    def fill(self, region: tuple[slice, ...], box: npt.NDArray[Any]) -> None:
        """Read a box of it into an array of its dtype and shape."""


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
        self._info = info
        self._row_bytes = info.nbytes // max(1, info.shape[0] if info.shape else 1)
        self._last: tuple[int, memoryview] | None = None

    def read_into(self, start: int, buffer: memoryview) -> None:
        """Fill `buffer` from position `start` on: whole rows go right into it."""
        done = 0
        while done < buffer.nbytes:
            row, offset = divmod(start + done, self._row_bytes)
            rows = (buffer.nbytes - done) // self._row_bytes
            if rows and not offset:
                part = buffer[done : done + rows * self._row_bytes]
                self._fill(row, rows, part)
            else:
                part = buffer[done : done + self._row_bytes - offset]
                part[:] = self._part_of_row(row, offset, part.nbytes)
            done += part.nbytes

    def _part_of_row(self, row: int, offset: int, nbytes: int) -> memoryview:
        last = self._last  # short reads come one after another from the same row
        if last is None or last[0] != row:
            last = row, memoryview(bytearray(self._row_bytes))
            self._fill(row, 1, last[1])
        self._last = last if offset + nbytes < self._row_bytes else None
        return last[1][offset : offset + nbytes]

    def _fill(self, row: int, rows: int, buffer: memoryview) -> None:
        shape = (rows, *self._info.shape[1:]) if self._info.shape else ()
        box = np.frombuffer(buffer, np.uint8).view(self._info.np_dtype).reshape(shape)
        self.boxes.fill((slice(row, row + rows),) if shape else (), box)

    def require_unchanged(self) -> None:
        """Its reader looks after the files of all arrays at once."""

    def close(self) -> None:
        """Nothing is held open."""
