"""The items of a conversion, written one after the other into the files of `torch.distributed.checkpoint`.

An item is a chunk as `torch.save` writes it, and how long that is shows only then. So items lie where those before them
end, and a journal says where: what it names is read back, and written again where it is not what it was. The same
tensor is the same bytes, so whatever follows stays where it is.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, NamedTuple, cast

import torch
from torch.distributed.checkpoint.filesystem import DEFAULT_SUFFIX

from minimax_jax.errors import CheckpointError, FormatError, JobError
from minimax_jax.io import points
from minimax_jax.io.files import Buffer, as_bytes, io_errors, open_regular, read_exactly, start_flush, write_exactly
from minimax_jax.io.journal import Journal, digest, new_digest
from minimax_jax.io.shards import DEFAULT_SHARD_BYTES
from minimax_jax.jobs.records import DIGEST, Check, Record, Saver, record_of, require_true
from minimax_jax.progress import Ticker
from torch_bridge.chunks import Chunk, Made, Maker, Unit, in_order

_PIECE_BYTES = 2**24
_ITEMS = "items"
"""What a record says of where the items of a unit lie."""


class Spot(NamedTuple):
    """Where an item lies: in which file, from which byte on, and how many."""

    file: str
    offset: int
    length: int


class Items:
    """Writes the items of units in order, on the thread that calls `write`.

    Attributes:
        records: what is done, by the name of the unit.
    """

    def __init__(self, folder: Path, units: Sequence[Unit], journal: Journal, found: Mapping[str, Record]):
        """Ready to work.

        Args:
            folder: where the files are.
            units: the work.
            journal: where units that are done are noted.
            found: the records of an earlier process, which count only where they prove true.
        """
        self.records: dict[str, Record] = {}
        self._folder, self._units, self._journal, self._found = folder, units, journal, found
        self._files = {
            chunk: _file_name(number) for number, chunks in enumerate(chunks_by_file(units)) for chunk in chunks
        }
        self._tail = _Tail(folder)

    def write(self, maker: Maker, workers: int, ticker: Ticker, check: Check) -> list[Spot]:
        """Make and write all units, but for those that are found done, and read back as many as `check` says.

        Returns:
            Where the items of all chunks lie, in order; they are on the disk.

        Raises:
            JobError: a write failed; what was read back is not what was written.
            CheckpointError: as `Maker.make`.
        """
        saver, spots = Saver(self._sync), list[Spot]()
        with contextlib.ExitStack() as stack:
            stack.callback(self._tail.close)
            made = in_order(lambda unit: self._make(maker, unit), self._units, workers)
            for unit, result in stack.enter_context(contextlib.closing(made)):
                ticker.tick(unit.read_bytes)
                record = self._found[self.name(unit)] if result is None else None
                if record is None or not self._adopts(record):
                    record = self._put(unit, result or maker.make(unit))
                self.records[self.name(unit)] = record
                spots += _spots(record)
                saver.did(unit.read_bytes)
            self._tail.end()
        require_true(self, self._units, check, self._folder)
        return spots

    def name(self, unit: Unit) -> str:
        """What the journal calls a unit: its first chunk."""
        chunk = unit.chunks[0]
        return f"{chunk.whole.key} {chunk.first}+{chunk.rows}"

    def holds(self, unit: Unit, record: Record) -> bool:
        """Whether the files hold what a record says, where they should; they are read for it."""
        spots = _spots(record)
        if [spot.file for spot in spots] != [self._files[chunk] for chunk in unit.chunks]:
            return False
        try:
            return digest(piece for spot in spots for piece in self._pieces(spot)) == record.get(DIGEST)
        except FormatError:  # the file is missing or too short, or the disk does not give it
            return False

    def _make(self, maker: Maker, unit: Unit) -> Made | None:
        """What comes of a unit; None where it is found done."""
        record = self._found.get(self.name(unit))
        return None if record is not None and self.holds(unit, record) else maker.make(unit)

    def _adopts(self, record: Record) -> bool:
        """Take a unit that was found done for written, if it lies where its turn is."""
        for spot in _spots(record):
            if self._tail.at(spot.file) != spot.offset:
                return False
            self._tail.skip(spot.length)
        return True

    def _put(self, unit: Unit, made: Made) -> Record:
        state, spots = new_digest(), list[Spot]()
        for chunk, tensor in zip(unit.chunks, made.tensors, strict=True):
            points.reach("before a write")
            offset = self._tail.at(self._files[chunk])
            stream = _Stream(self._tail, state.update)
            torch.save(_alone(tensor), cast(IO[bytes], stream))
            stream.require_written()
            spots.append(Spot(self._files[chunk], offset, self._tail.at(self._files[chunk]) - offset))
        record = {**record_of(self.name(unit), state.hexdigest(), made.kept), _ITEMS: spots}
        self._journal.note(record)
        return record

    def _pieces(self, spot: Spot) -> Iterator[memoryview]:
        file = self._folder / spot.file
        fd = open_regular(file)
        try:
            for start in range(0, spot.length, _PIECE_BYTES):
                piece = memoryview(bytearray(min(_PIECE_BYTES, spot.length - start)))
                read_exactly(fd, file, spot.offset + start, piece)
                yield piece
        finally:
            os.close(fd)

    def _sync(self) -> None:
        self._tail.sync()
        self._journal.sync()


class _Tail:
    """The end of what is whole, in the file whose turn it is; what lies behind it is written over, or cut off."""

    def __init__(self, folder: Path):
        self._folder, self._name, self._fd, self._end = folder, "", -1, 0

    def at(self, name: str) -> int:
        """Where a file goes on, which is that of the last call, or the next one."""
        if name != self._name:
            self.end()
            with io_errors(JobError, "file cannot be opened", self._folder / name):
                self._fd = os.open(self._folder / name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            self._name = name
        return self._end

    def skip(self, nbytes: int) -> None:
        """Go on behind bytes that are there."""
        self._end += nbytes

    def write(self, data: memoryview) -> None:
        """Write bytes, and go on behind them."""
        write_exactly(self._fd, self._folder / self._name, self._end, data)
        start_flush(self._fd, self._end, data.nbytes)
        self._end += data.nbytes

    def sync(self) -> None:
        """Make what was written survive a power cut."""
        if self._fd >= 0:
            with io_errors(JobError, "file cannot be flushed to disk", self._folder / self._name):
                os.fsync(self._fd)

    def end(self) -> None:
        """Let the file end here, on the disk, and close it."""
        if self._fd >= 0:
            with io_errors(JobError, "file cannot be given its size", self._folder / self._name):
                os.ftruncate(self._fd, self._end)
            self.sync()
        self.close()

    def close(self) -> None:
        """Leave the file as it is."""
        if self._fd >= 0:
            os.close(self._fd)
        self._name, self._fd, self._end = "", -1, 0


class _Stream:
    """What `torch.save` takes for a file. torch is in C++ when it writes, where an error would be lost: it is kept."""

    def __init__(self, tail: _Tail, seen: Callable[[memoryview], object]):
        self._tail, self._seen = tail, seen
        self._error: CheckpointError | None = None

    def write(self, data: Buffer) -> int:
        """Write on."""
        view = as_bytes(data)
        try:
            if self._error is None:
                self._tail.write(view)
                self._seen(view)
        except CheckpointError as error:
            self._error = error
        return view.nbytes

    def flush(self) -> None:
        """There is nothing to flush."""

    def require_written(self) -> None:
        """Raise what went wrong."""
        if self._error is not None:
            raise self._error


def chunks_by_file(units: Sequence[Unit]) -> list[list[Chunk]]:
    """Which chunks go into one file: as many as fit, at least one; by the bytes of the tensors."""
    files, filled_bytes = [list[Chunk]()], 0
    for chunk in (chunk for unit in units for chunk in unit.chunks):
        if files[-1] and filled_bytes + chunk.nbytes > DEFAULT_SHARD_BYTES:
            files.append([])
            filled_bytes = 0
        files[-1].append(chunk)
        filled_bytes += chunk.nbytes
    return files


def _file_name(number: int) -> str:
    """What torch calls such a file: that of the first process, and of its only thread."""
    return f"__0_{number}_0{DEFAULT_SUFFIX}"


def _alone(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor without what else may lie in its storage, all of which `torch.save` would write."""
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()


def _spots(record: Record) -> list[Spot]:
    """Where a record says that the items lie; none where that makes no sense."""
    match record.get(_ITEMS):
        case [*told] if all(_is_spot(each) for each in told):
            return [Spot(*each) for each in told]
    return []


def _is_spot(told: object) -> bool:
    match told:
        case [str(), int() as offset, int() as length]:
            return offset >= 0 and length >= 0
    return False
