"""Writing tensors into preallocated files: in any order, from any thread, each byte exactly once."""

from __future__ import annotations

import errno
import functools
import os
import shutil
import threading
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from minimax_jax.errors import JobError, Problem, raise_if
from minimax_jax.io import points
from minimax_jax.io.checkpoint import INDEX_SUFFIX
from minimax_jax.io.files import Buffer, as_bytes, io_errors, read_exactly, start_flush, sync_folder, write_exactly
from minimax_jax.io.handles import Handles
from minimax_jax.io.jsonfile import shown, write_json_atomic
from minimax_jax.io.shards import ShardLayout, index_of

_STAT_BLOCK_BYTES = 512  # whatever the file system's own blocks are
_FLAGS = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC
_NOT_SUPPORTED = frozenset({errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS})


class Writer:
    """A context that writes the files of a checkpoint into a folder; `write` may be called from any number of threads.

    Files take their full size at once, so that a full disk shows before the work begins. Headers are written last, by
    `finish`: a file that was not finished cannot be taken for a whole one. The folder is the caller's: for a checkpoint
    that appears all at once, give a folder under a temporary name and rename it after `finish`.

    Attributes:
        folder: where the files are.
        shards: what they are to hold.
    """

    def __init__(
        self,
        folder: Path,
        shards: Sequence[ShardLayout],
        *,
        beside: Sequence[ShardLayout] = (),
        stem: str = "model",
        resume: bool = False,
    ):
        """Create the files.

        Args:
            folder: an existing folder in which none of the files exists.
            shards: from `lay_out`.
            beside: files that the index does not speak of.
            stem: several shards get an index named `<stem>.safetensors.index.json`.
            resume: go on with the files of a writer that did not finish; those that are missing are created. What was
                written then counts when it is adopted.

        Raises:
            JobError: a file exists, cannot be created, or does not fit on the disk; no new file is left behind then.
        """
        self.folder = folder
        self.shards = tuple(shards)
        self._files = (*self.shards, *beside)
        self._index_file = folder / f"{stem}{INDEX_SUFFIX}" if len(self.shards) > 1 else None
        self._slots = {
            key: _Slot(key=key, file=folder / shard.file_name, start=start, nbytes=stop - start)
            for shard in self._files
            for key, (start, stop) in shard.tensors.items()
        }
        self._lock = threading.Lock()
        self._handles = Handles(functools.partial(_open_file, flags=_FLAGS if resume else _FLAGS | os.O_EXCL))
        self._create(resume)

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the files once writes under way have ended; those that are not finished stay without a header."""
        self._handles.close()

    def write(self, key: str, data: Buffer, offset_bytes: int = 0) -> None:
        """Write part of a tensor, or all of it.

        Args:
            key: which tensor.
            data: its bytes; an array may have any dtype, and must be contiguous in row-major order.
            offset_bytes: where in the tensor they begin.

        Raises:
            JobError: no such tensor, bytes outside of it or given before, an array that is not contiguous, a closed
                writer, a disk that fails.
        """
        slot, view = self._slot(key), as_bytes(data)
        with self._handles.use(slot.file) as fd:
            with self._lock:
                slot.claim(offset_bytes, offset_bytes + view.nbytes)
            write_exactly(fd, slot.file, slot.start + offset_bytes, view)
            start_flush(fd, slot.start + offset_bytes, view.nbytes)
            with self._lock:
                slot.written_bytes += view.nbytes

    def adopt(self, key: str, nbytes: int, offset_bytes: int = 0) -> None:
        """Count bytes as written that the file holds from before; raises as `write`."""
        slot = self._slot(key)
        with self._lock:
            slot.claim(offset_bytes, offset_bytes + nbytes)
            slot.written_bytes += nbytes

    def read(self, key: str, nbytes: int, offset_bytes: int = 0) -> memoryview:
        """What the file holds of a tensor, from `offset_bytes` on, as a fresh copy.

        Raises:
            JobError: no such tensor, or a closed writer.
            FormatError: the file is shorter than it was made, or cannot be read.
        """
        slot, buffer = self._slot(key), memoryview(bytearray(nbytes))
        with self._handles.use(slot.file) as fd:
            read_exactly(fd, slot.file, slot.start + offset_bytes, buffer)
        return buffer

    def sync(self) -> None:
        """Make what was written so far survive a power cut.

        Raises:
            JobError: a closed writer, or a disk that fails.
        """
        for shard in self._files:
            self._sync(self.folder / shard.file_name)

    def finish(self) -> None:
        """Check that every byte was written, then make the files whole: data to disk, headers, the index last.

        The writer is closed afterwards.

        Raises:
            JobError: bytes that were never written, of all tensors; a closed writer; a disk that fails.
        """
        with self._lock:
            raise_if((slot.missing() for slot in self._slots.values() if slot.written_bytes < slot.nbytes), JobError)
        self.sync()
        for shard in self._files:
            points.reach("before a header")
            file = self.folder / shard.file_name
            with self._handles.use(file) as fd:
                write_exactly(fd, file, 0, memoryview(shard.header))
        self.sync()
        sync_folder(self.folder)
        if self._index_file is not None:
            points.reach("before the index")
            write_json_atomic(self._index_file, index_of(self.shards))
        self.close()

    def _slot(self, key: str) -> _Slot:
        if key not in self._slots:
            raise JobError(Problem(what="no such tensor in the layout", file=str(self.folder), key=shown(key)))
        return self._slots[key]

    def _sync(self, file: Path) -> None:
        with self._handles.use(file) as fd, io_errors(JobError, "file cannot be flushed to disk", file):
            os.fsync(fd)

    def _create(self, resume: bool) -> None:
        if self._index_file is not None and self._index_file.exists() and not resume:
            raise JobError(Problem(what="file exists already", file=str(self._index_file)))
        _require_space(self.folder, self._files)
        with ExitStack() as undo:
            undo.callback(self.close)
            for shard in self._files:
                file = self.folder / shard.file_name
                existed = file.exists()
                with self._handles.use(file) as fd:
                    if not existed:
                        undo.callback(file.unlink)
                    _allocate(fd, file, shard.file_bytes)
            undo.pop_all()


@dataclass(kw_only=True, slots=True)
class _Slot:
    """What has been written of one tensor.

    `edges` holds begin and end of each range that was handed in, sorted, touching ranges joined: begins at even
    positions, ends at odd ones. A range is counted in `written_bytes` only when it has reached the file.
    """

    key: str
    file: Path
    start: int
    nbytes: int
    edges: list[int] = field(default_factory=list)
    written_bytes: int = 0

    def claim(self, begin: int, end: int) -> None:
        """Note that the bytes from `begin` to `end` are being written; refuse those that are not free."""
        if not 0 <= begin <= end <= self.nbytes:
            raise JobError(self._problem("write outside of the tensor", f"bytes 0 to {self.nbytes:,}", begin, end))
        if begin == end:
            return
        place = bisect_right(self.edges, begin)
        if place % 2 or place != bisect_left(self.edges, end):
            raise JobError(self._problem("bytes written twice", "each byte once", begin, end))
        left, right = bisect_left(self.edges, begin), bisect_right(self.edges, end)
        self.edges[left:right] = [begin] * (left % 2 == 0) + [end] * (right % 2 == 0)

    def missing(self) -> Problem:
        """The problem of a tensor that is not whole, naming the first gap."""
        bounds = [0, *self.edges, self.nbytes]
        gap = next((pair for pair in zip(bounds[::2], bounds[1::2], strict=True) if pair[0] < pair[1]), None)
        what = "tensor is not whole: bytes were never written" if gap else "tensor is not whole: a write is unfinished"
        got = f"{self.written_bytes:,} bytes" + (f", nothing at bytes {gap[0]:,} to {gap[1]:,}" if gap else "")
        return Problem(what=what, file=str(self.file), key=shown(self.key), expected=f"{self.nbytes:,} bytes", got=got)

    def _problem(self, what: str, expected: str, begin: int, end: int) -> Problem:
        got = f"bytes {begin:,} to {end:,}"
        return Problem(what=what, file=str(self.file), key=shown(self.key), expected=expected, got=got)


def _open_file(file: Path, *, flags: int) -> int:
    with io_errors(JobError, "file cannot be created", file):
        return os.open(file, flags, 0o666)


def _require_space(folder: Path, shards: Sequence[ShardLayout]) -> None:
    with io_errors(JobError, "folder cannot be written to", folder):
        free = shutil.disk_usage(folder).free
        files = (folder / shard.file_name for shard in shards)
        allocated = sum(file.stat().st_blocks * _STAT_BLOCK_BYTES for file in files if file.exists())
    needed = sum(shard.file_bytes for shard in shards) - allocated
    if needed > free:
        raise JobError(_no_space(folder, needed, free))


def _no_space(path: Path, needed: int, free: int) -> Problem:
    expected, got = f"{needed:,} bytes needed", f"{free:,} bytes free"
    remedy = "free some space, or choose a destination on another disk"
    return Problem(what="not enough space on the disk", file=str(path), expected=expected, got=got, remedy=remedy)


def _allocate(fd: int, file: Path, nbytes: int) -> None:
    with io_errors(JobError, "file cannot be given its full size", file):
        try:
            size = os.fstat(fd).st_size
            if size == nbytes:  # of an earlier or another process: what stands in for fallocate may touch its data
                return
            if size > nbytes:
                os.ftruncate(fd, nbytes)
            if hasattr(os, "posix_fallocate"):  # not on macOS
                os.posix_fallocate(fd, 0, nbytes)
                return
        except OSError as error:
            if error.errno in {errno.ENOSPC, errno.EDQUOT}:
                raise JobError(_no_space(file, nbytes, shutil.disk_usage(file.parent).free)) from error
            if error.errno not in _NOT_SUPPORTED:
                raise
        os.ftruncate(fd, nbytes)
