"""Any rectangle of a stored tensor, by the byte ranges that hold it."""

from __future__ import annotations

import itertools
import math
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np

from minimax_jax.io.header import TensorInfo
from minimax_jax.io.reader import Reader

_LEAST_RUN_BYTES = 2**16
"""Ranges shorter than this are read together with what lies between them: a call for each would take longer."""


class Boxes:
    """Reads rectangles of the tensors of a checkpoint; safe to call from several threads.

    Attributes:
        read_bytes: bytes read so far.
    """

    def __init__(self, reader: Reader):
        self.read_bytes = 0
        self._reader = reader
        self._lock = threading.Lock()

    def read(self, info: TensorInfo, region: Sequence[range]) -> np.ndarray[Any, Any]:
        """The rectangle `region` of a tensor, in a fresh array, or in a view of one that holds what lies between.

        Args:
            info: a tensor of the checkpoint that the reader reads.
            region: of each axis, the indices that are wanted.
        """
        covered = _covered(info, region)
        out = np.empty([len(part) for part in covered], info.np_dtype)
        if out.size:
            self._fill(info, covered, out)
        within = (
            slice(part.start - held.start, part.stop - held.start) for part, held in zip(region, covered, strict=True)
        )
        return out[tuple(within)]

    def _fill(self, info: TensorInfo, region: Sequence[range], out: np.ndarray[Any, Any]) -> None:
        origin = [part.start for part in region]
        for leading in np.ndindex(out.shape[: _run_axis(info.shape, region)]):
            first = [at + step for at, step in itertools.zip_longest(origin, leading, fillvalue=0)]
            start = int(np.ravel_multi_index(first, info.shape)) * out.itemsize
            self._reader.read_into(info.file, info.start + start, out[leading])
        with self._lock:
            self.read_bytes += out.nbytes


def _covered(info: TensorInfo, region: Sequence[range]) -> list[range]:
    """What is read for `region`: it, or more where it lies in short ranges."""
    covered = list(region)
    if not all(covered):
        return covered
    axis = _run_axis(info.shape, covered)
    while axis > 0 and math.prod(map(len, covered[axis:])) * info.np_dtype.itemsize < _LEAST_RUN_BYTES:
        covered[axis] = range(info.shape[axis])
        axis = _run_axis(info.shape, covered)
    return covered


def _run_axis(shape: Sequence[int], region: Sequence[range]) -> int:
    """The axis from which on a region lies in one range: behind the leading axes of which it has one index each."""
    cut = [axis for axis, part in enumerate(region) if len(part) != shape[axis]]
    axis = cut[-1] if cut else 0
    while axis and len(region[axis - 1]) == 1:
        axis -= 1
    return axis
