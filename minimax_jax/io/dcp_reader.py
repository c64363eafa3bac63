"""Reads the tensors of a checkpoint of `torch.distributed.checkpoint`, box by box."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from minimax_jax.dtypes import DTYPES
from minimax_jax.errors import FormatError, Problem
from minimax_jax.io.array_reader import ArrayReader
from minimax_jax.io.checkpoint import Checkpoint
from minimax_jax.io.dcp import Chunk, Chunked, Contents
from minimax_jax.io.files import FileState
from minimax_jax.io.header import TensorInfo
from minimax_jax.io.jsonfile import shown
from minimax_jax.io.location import Location
from minimax_jax.io.source import open_file
from minimax_jax.io.torch_archive import Stored, find_tensor


class DcpReader(ArrayReader):
    """Reads the tensors of a checkpoint that `dcp.describe` has described."""

    def __init__(self, checkpoint: Checkpoint, contents: Contents):
        super().__init__(checkpoint)
        self._contents = contents

    def boxes(self, info: TensorInfo) -> ChunkedArray:
        """A tensor."""
        return ChunkedArray(self._contents.tensors[info.key], self._contents.states)

    def require_unchanged(self) -> None:
        """Check that no file of the checkpoint was written to, replaced or lost meanwhile; raises a FormatError."""
        for file, state in self._contents.states.items():
            open_file(file, state).close()


class ChunkedArray:
    """A tensor in chunks; safe to read from several threads."""

    def __init__(self, tensor: Chunked, states: Mapping[Location, FileState]):
        self._tensor, self._states = tensor, states
        self._stored: dict[Chunk, Stored] = {}

    def read_region(self, region: tuple[slice, ...]) -> npt.NDArray[Any]:
        """A box, a range with start and stop for each of the first axes, as a fresh array; raises as `fill`."""
        sizes = [part.stop - part.start for part in region]
        box = np.empty((*sizes, *self._tensor.shape[len(region) :]), DTYPES[self._tensor.dtype])
        self.fill(region, box)
        return box

    def fill(self, region: tuple[slice, ...], box: npt.NDArray[Any]) -> None:
        """Read a box into an array of its dtype and shape.

        Raises:
            FormatError: a file has changed or cannot be read, or does not hold what the table of contents says.
        """
        wanted = (*region, *(slice(0, size) for size in self._tensor.shape[len(region) :]))
        for chunk in self._tensor.chunks:
            there = list(map(_common, wanted, chunk.offsets, chunk.sizes))
            if all(part.start < part.stop for part in there):
                inside = tuple(map(_moved, there, chunk.offsets))
                place: tuple[Any, ...] = (*map(_moved, there, (part.start for part in wanted)), ...)
                self._read(chunk, inside, box[place])  # by `...` a view, of a number too

    def _read(self, chunk: Chunk, region: tuple[slice, ...], box: npt.NDArray[Any]) -> None:
        spot = chunk.spot
        with contextlib.closing(open_file(spot.file, self._states[spot.file])) as opened:
            if chunk not in self._stored:
                found = find_tensor(opened, spot.start, spot.stop, file=spot.file, key=self._tensor.key)
                self._stored[chunk] = self._fitting(found, chunk)
            self._stored[chunk].fill(opened, region, box)

    def _fitting(self, found: Stored, chunk: Chunk) -> Stored:
        if (found.dtype, found.shape) == (self._tensor.dtype, chunk.sizes):
            return found
        expected, got = f"{self._tensor.dtype} {list(chunk.sizes)}", f"{found.dtype} {list(found.shape)}"
        what, file = "another chunk than the table of contents says", str(chunk.spot.file)
        raise FormatError(Problem(what=what, file=file, key=shown(self._tensor.key), expected=expected, got=got))


def _common(part: slice, first: int, size: int) -> slice:
    """What a range has in common with that of a chunk."""
    return slice(max(part.start, first), min(part.stop, first + size))


def _moved(part: slice, origin: int) -> slice:
    """A range counted from another origin."""
    return slice(part.start - origin, part.stop - origin)
