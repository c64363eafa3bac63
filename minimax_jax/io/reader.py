"""Reading tensors: a view of the memory map, a fresh array, or bytes into a buffer of the caller's."""

from __future__ import annotations

import mmap
import os
import threading
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from minimax_jax.errors import FormatError, JobError, LayoutError, Problem
from minimax_jax.io.checkpoint import Checkpoint
from minimax_jax.io.files import as_bytes, io_errors, open_regular, read_exactly, short_file
from minimax_jax.io.handles import Handles
from minimax_jax.io.header import TensorInfo
from minimax_jax.io.jsonfile import shown


class Reader:
    """A context that reads the files of one checkpoint; its methods may be called from any number of threads.

    Files are opened on first use and stay open until the context ends. Reads carry their own position, so that threads
    do not disturb each other.

    Attributes:
        checkpoint: what is read.
    """

    def __init__(self, checkpoint: Checkpoint):
        self.checkpoint = checkpoint
        self._files = frozenset(checkpoint.files)
        self._handles = Handles(self._open)
        self._maps: dict[Path, mmap.mmap] = {}
        self._lock = threading.Lock()

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the files once reads under way have ended. Views stay valid: each keeps its memory map alive."""
        self._handles.close()
        self._maps.clear()

    def view(self, info: TensorInfo, rows: slice | None = None) -> npt.NDArray[Any]:
        """The tensor, or a range of its rows, as a read-only view of the memory map: nothing is read or copied yet.

        The view is aligned as well as the file is. A file that is shortened by others while it is mapped kills the
        process on access (SIGBUS): where that can happen, use `read`.

        Args:
            info: a tensor of this checkpoint.
            rows: range of the leading axis, step 1; the whole tensor if None.

        Returns:
            `[rows, ...]` in the dtype of the file; valid beyond the life of the reader.

        Raises:
            FormatError: the file is shorter than it was when the checkpoint was opened, or cannot be opened.
            LayoutError: the tensor has no such rows.
        """
        rows = rows if rows is not None else slice(None)
        if rows.step not in (None, 1):
            raise LayoutError(Problem(what="rows can only be viewed one after another", key=info.key, got=str(rows)))
        start, shape = _row_range(info, rows.start, rows.stop)
        return np.ndarray(shape, info.np_dtype, buffer=self._map(info), offset=start)

    def read(self, info: TensorInfo, start_row: int | None = None, stop_row: int | None = None) -> npt.NDArray[Any]:
        """The tensor, or rows `start_row` to `stop_row` of its leading axis, as a fresh array `[rows, ...]`.

        Raises:
            FormatError: the file is shorter than it was when the checkpoint was opened, or cannot be read.
            LayoutError: the tensor has no such rows.
        """
        start, shape = _row_range(info, start_row, stop_row)
        array = np.empty(shape, info.np_dtype)
        self.read_into(info.file, start, array)
        return array

    def read_into(self, file: Path, start: int, buffer: bytearray | memoryview | npt.NDArray[Any]) -> None:
        """Fill `buffer` with the bytes of `file`, a file of this checkpoint, from position `start` on.

        Raises:
            FormatError: the file ends too early (what was read so far stands in `buffer`), or cannot be read.
            JobError: `buffer` is read-only or not contiguous in row-major order, or the context has ended.
        """
        view = as_bytes(buffer)
        if view.readonly:
            raise JobError(Problem(what="buffer to read into is read-only", file=str(file)))
        with self._handles.use(file) as fd:
            read_exactly(fd, file, start, view)

    def _open(self, file: Path) -> int:
        if file not in self._files:
            raise JobError(Problem(what="file is not part of the checkpoint that is read", file=str(file)))
        return open_regular(file)

    def _map(self, info: TensorInfo) -> mmap.mmap:
        with self._handles.use(info.file) as fd, self._lock:
            got = os.fstat(fd).st_size
            if got < info.stop:
                raise FormatError(short_file(info.file, expected_bytes=info.stop, got_bytes=got, key=shown(info.key)))
            mapped = self._maps.get(info.file)
            if mapped is None or len(mapped) < info.stop:
                with io_errors(FormatError, "file cannot be mapped into memory", info.file):
                    mapped = self._maps[info.file] = mmap.mmap(fd, 0, access=mmap.ACCESS_READ)
            return mapped


def _row_range(info: TensorInfo, start_row: int | None, stop_row: int | None) -> tuple[int, tuple[int, ...]]:
    if start_row is None and stop_row is None:
        return info.start, info.shape
    rows = info.shape[0] if info.shape else 0
    first, last = start_row or 0, rows if stop_row is None else stop_row
    if not info.shape or not 0 <= first <= last <= rows:
        expected, got = f"rows 0 to {rows} of shape {info.shape}", f"rows {first} to {last}"
        raise LayoutError(
            Problem(what="no such rows", file=str(info.file), key=shown(info.key), expected=expected, got=got)
        )
    return info.start + first * (info.nbytes // max(rows, 1)), (last - first, *info.shape[1:])
