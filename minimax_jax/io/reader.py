"""Reading tensors: a view of the memory map, a fresh array, or bytes into a buffer of the caller's."""

from __future__ import annotations

import mmap
import operator
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from minimax_jax.errors import FormatError, JobError, LayoutError, Problem
from minimax_jax.io.checkpoint import Checkpoint
from minimax_jax.io.files import FileState, as_bytes, io_errors, short_file
from minimax_jax.io.handles import Handles
from minimax_jax.io.header import TensorInfo
from minimax_jax.io.jsonfile import shown
from minimax_jax.io.location import Location
from minimax_jax.io.source import LocalFile, OpenFile, open_file

Empty: TypeAlias = Callable[[tuple[int, ...], np.dtype[Any]], npt.NDArray[Any]]
"""Gives an array of a shape and a dtype whose contents are undefined."""

_GAP_BYTES = 2**18
"""Farther apart, another request costs less time than the bytes between."""

_RUN_BYTES = 2**25
"""Most bytes of several tensors in one request."""


class Reader:
    """A context that reads the files of one checkpoint; its methods may be called from any number of threads.

    Files are opened on first use and stay open until the context ends. Reads carry their own position, so that threads
    do not disturb each other. Each file must be what it was when the checkpoint was opened, when it is opened here and
    still when the context ends: a context that ends well has read one state of every file.

    Attributes:
        checkpoint: what is read.
    """

    def __init__(self, checkpoint: Checkpoint, *, whole_files: bool = True):
        """A reader of `checkpoint`.

        Args:
            checkpoint: what is read.
            whole_files: whether much of each file will be read: those of a hub repository are then fetched as a whole.
        """
        self.checkpoint = checkpoint
        self._whole_files = whole_files
        self._files = frozenset(checkpoint.files)
        self._handles: Handles[Location, OpenFile] = Handles(self._open, close=operator.methodcaller("close"))
        self._maps: dict[Location, mmap.mmap] = {}
        self._lock = threading.Lock()

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, kind: object, *exception: object) -> None:
        try:
            if kind is None:
                self.require_unchanged()
        finally:
            self.close()

    def require_unchanged(self) -> None:
        """Check that the files that were read from are still what they were.

        Raises:
            FormatError: one was written to, replaced or shortened meanwhile.
        """
        for opened in self._handles.opened():
            opened.require_unchanged()

    def close(self) -> None:
        """Close the files once reads under way have ended. Views stay valid: each keeps its memory map alive."""
        self._handles.close()
        self._maps.clear()

    def view(self, info: TensorInfo, rows: slice | None = None) -> npt.NDArray[Any]:
        """The tensor, or a range of its rows, as a read-only view of the memory map: nothing is read or copied yet.

        What lies behind a URL has no memory map: it is read now, into a fresh array. The view is aligned as well as the
        file is. A file that is shortened by others while it is mapped kills the
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
        with self._handles.use(info.file) as opened:
            if isinstance(opened, LocalFile):
                return np.ndarray(shape, info.np_dtype, buffer=self._map(opened, info), offset=start)
        fetched = self.read(info, rows.start, rows.stop)
        fetched.flags.writeable = False
        return fetched

    def read(
        self, info: TensorInfo, start_row: int | None = None, stop_row: int | None = None, *, empty: Empty = np.empty
    ) -> npt.NDArray[Any]:
        """The tensor, or rows `start_row` to `stop_row` of its leading axis, as an array `[rows, ...]`.

        The array is fresh, or in memory that `empty` gives for a shape and a dtype.

        Raises:
            FormatError: the file is shorter than it was when the checkpoint was opened, or cannot be read.
            LayoutError: the tensor has no such rows.
        """
        start, shape = _row_range(info, start_row, stop_row)
        array = empty(shape, info.np_dtype)
        self.read_into(info.file, start, array)
        return array

    def read_region(self, info: TensorInfo, region: tuple[slice, ...]) -> npt.NDArray[Any]:
        """A box of a tensor, as a fresh array; of files, whole rows of the leading axis are read for it.

        Args:
            info: a tensor of this checkpoint.
            region: a range with start and stop for each axis.

        Raises:
            FormatError: as `read`.
            LayoutError: as `read`.
        """
        rows = self.read(info, region[0].start, region[0].stop)
        return np.ascontiguousarray(rows[(slice(None), *region[1:])])

    def read_many(self, infos: Iterable[TensorInfo], *, empty: Empty = np.empty) -> dict[str, npt.NDArray[Any]]:
        """Tensors by key: as `read`, but those that lie close together take one request, into fresh arrays.

        That is for files behind URLs; local ones are read one by one. What lies in the gaps is fetched and forgotten,
        so for a moment this takes as much memory again as one request brings.

        Raises:
            FormatError: as `read`.
        """
        found: dict[str, npt.NDArray[Any]] = {}
        for run in _runs(infos):
            found |= {run[0].key: self.read(run[0], empty=empty)} if len(run) == 1 else self._read_run(run)
        return found

    def _read_run(self, run: Sequence[TensorInfo]) -> dict[str, npt.NDArray[Any]]:
        """Tensors of one file, in the order of the data, by one read from the first to the last."""
        start = run[0].start
        whole = np.empty(run[-1].stop - start, np.uint8)
        self.read_into(run[0].file, start, whole)
        parts = {info.key: whole[info.start - start : info.stop - start].copy() for info in run}
        return {info.key: parts[info.key].view(info.np_dtype).reshape(info.shape) for info in run}

    def read_into(self, file: Location, start: int, buffer: bytearray | memoryview | npt.NDArray[Any]) -> None:
        """Fill `buffer` with the bytes of `file`, a file of this checkpoint, from position `start` on.

        Raises:
            FormatError: the file ends too early (what was read so far stands in `buffer`), or cannot be read.
            JobError: `buffer` is read-only or not contiguous in row-major order, or the context has ended.
        """
        view = as_bytes(buffer)
        if view.readonly:
            raise JobError(Problem(what="buffer to read into is read-only", file=str(file)))
        with self._handles.use(file) as opened:
            opened.read_into(start, view)

    def _open(self, file: Location) -> OpenFile:
        if file not in self._files:
            raise JobError(Problem(what="file is not part of the checkpoint that is read", file=str(file)))
        return open_file(file, self.checkpoint.states.get(file), data=self._whole_files)

    def _map(self, opened: LocalFile, info: TensorInfo) -> mmap.mmap:
        got = FileState.of(opened.fd).nbytes
        if got < info.stop:
            raise FormatError(short_file(info.file, expected_bytes=info.stop, got_bytes=got, key=shown(info.key)))
        with self._lock:
            if info.file not in self._maps:
                with io_errors(FormatError, "file cannot be mapped into memory", info.file):
                    self._maps[info.file] = mmap.mmap(opened.fd, 0, access=mmap.ACCESS_READ)
            return self._maps[info.file]


def _runs(infos: Iterable[TensorInfo]) -> Iterator[list[TensorInfo]]:
    """Tensors that are to be read together: of one remote file, close to each other, and not too many bytes."""
    run: list[TensorInfo] = []
    for info in sorted(infos, key=lambda info: (str(info.file), info.start, info.stop)):
        if run and (
            isinstance(info.file, Path)
            or info.file != run[0].file
            or info.start - run[-1].stop > _GAP_BYTES
            or info.stop - run[0].start > _RUN_BYTES
        ):
            yield run
            run = []
        run.append(info)
    if run:
        yield run


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
