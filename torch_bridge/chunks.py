"""A checkpoint as native tensors, some rows or experts at a time: what is streamed elsewhere without being held."""

from __future__ import annotations

import collections
import itertools
import threading
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch

from minimax_jax.dtypes import DTYPES
from minimax_jax.errors import JobError, raise_if
from minimax_jax.io.reader import Reader
from minimax_jax.jobs.budget import over_budget, share_bytes
from minimax_jax.jobs.quantize import quantize_leaf
from minimax_jax.jobs.read import read_leaf, rows_of
from minimax_jax.jobs.source import Source, batches
from minimax_jax.layout.specs import Entry, TensorSpec
from minimax_jax.layout.table import SCALE_SUFFIX
from minimax_jax.leaves import Leaf, recast
from minimax_jax.ops.scaled import BlockScaled
from torch_bridge import memory
from torch_bridge.arrays import to_torch

_UNIT_BYTES = 2**26
"""Most memory of one unit where it can be split: larger units are no faster and only hold more memory."""

_COPIES_OF_INPUT, _COPIES_OF_OUTPUT = 2, 3
"""What a conversion holds at its peak: what it read and its device copy; its output and two temporaries like it."""

_FP8 = "F8_E4M3"


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """Rows of one native tensor, or all of it.

    Attributes:
        whole: the tensor.
        first: the first of the rows.
        rows: how many.
    """

    whole: TensorSpec
    first: int
    rows: int

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the chunk."""
        return (self.rows, *self.whole.shape[1:])

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return self.rows * (self.whole.nbytes // self.whole.shape[0])


@dataclass(frozen=True, kw_only=True)
class Unit:
    """What is made in one go.

    Attributes:
        entry: the entry, narrowed to the experts of this unit.
        chunks: what comes of it: of FP8 the codes, then the scales.
        read_bytes: bytes of the tensors that are read.
        memory_bytes: peak memory.
        as_it_is: whether stored rows are passed on.
    """

    entry: Entry
    chunks: tuple[Chunk, ...]
    read_bytes: int
    memory_bytes: int
    as_it_is: bool


def plan_units(source: Source, dtype: str, *, max_memory_bytes: int, workers: int) -> list[Unit]:
    """The units of a whole checkpoint, in its order, of which `workers` and one more are in memory at a time.

    Args:
        source: what is read.
        dtype: stored dtype of block-scaled weights; other tensors keep theirs.
        max_memory_bytes: peak memory of all.
        workers: units in work at a time.

    Raises:
        JobError: a budget too small for the units that cannot be split.
    """
    most_bytes = share_bytes(max_memory_bytes, workers + 1)
    entries = source.survey.specs.entries
    units = [unit for entry in entries for unit in _units(entry, source, dtype, max(1, min(_UNIT_BYTES, most_bytes)))]
    largest = max(unit.memory_bytes for unit in units)
    raise_if(over_budget(largest, max_memory_bytes, workers, waiting=1), JobError)
    return units


class Maker:
    """Makes the tensors of units; safe to call from several threads.

    Attributes:
        kept: names of weights that were quantised with their source scales.
        fresh: names of weights that were quantised with scales by amax.
    """

    def __init__(self, source: Source, reader: Reader, dtype: str):
        self.kept: list[str] = []
        self.fresh: list[str] = []
        self._source, self._reader, self._dtype = source, reader, dtype
        self._lock = threading.Lock()

    def stream(self, units: Iterable[Unit], workers: int) -> Generator[tuple[Unit, list[torch.Tensor]], None, None]:
        """The units with the tensors of their chunks, in order; `workers` of them are made ahead.

        Raises:
            FormatError: the source changed or ends too early while it is read.
            NumericError: NaN or infinity in weights to be quantised.
        """
        pool = ThreadPoolExecutor(workers, thread_name_prefix="convert")
        ahead: collections.deque[tuple[Unit, Future[list[torch.Tensor]]]] = collections.deque()
        left = iter(units)
        try:
            ahead.extend((unit, pool.submit(self.make, unit)) for unit in itertools.islice(left, workers))
            while ahead:
                unit, made = ahead.popleft()
                yield unit, made.result()
                del made
                memory.return_freed()
                ahead.extend((unit, pool.submit(self.make, unit)) for unit in itertools.islice(left, 1))
        finally:
            pool.shutdown(cancel_futures=True)

    def make(self, unit: Unit) -> list[torch.Tensor]:
        """The tensors of the chunks of a unit, new."""
        first = unit.chunks[0].first
        if unit.as_it_is:
            (spec,) = self._source.specs(unit.entry)
            rows = (first, first + unit.chunks[0].rows)
            return [to_torch(self._reader.read(self._source.checkpoint.tensors[spec.key], *rows))]
        keep = self._dtype == _FP8
        leaf = read_leaf(self._source, self._reader, unit.entry, first, None if keep else DTYPES[self._dtype])
        if keep and not isinstance(leaf, BlockScaled):
            leaf = self._quantize(unit, leaf)
        arrays = recast(unit.entry, leaf, DTYPES[self._dtype])
        return [to_torch(arrays[chunk.whole.key]) for chunk in unit.chunks]

    def _quantize(self, unit: Unit, leaf: Any) -> Leaf:
        info = self._source.sidecar.get(unit.entry.native + SCALE_SUFFIX)
        scales = None if info is None else self._reader.read(info, *rows_of(unit.entry, unit.chunks[0].first))
        scaled, kept = quantize_leaf(unit.entry, leaf, scales)
        with self._lock:
            for key, held in kept.items():
                (self.kept if held else self.fresh).append(key)
        return scaled


def _units(entry: Entry, source: Source, dtype: str, most_bytes: int) -> Iterator[Unit]:
    stored = source.survey.dtypes[entry.native]
    target = dtype if entry.row.scaled else stored
    if not entry.row.grouped and target == stored != _FP8:
        yield from _rows(entry, stored, most_bytes)
        return
    for some, first in batches(entry, _memory_bytes(entry, source, target), most_bytes):
        narrow = zip(entry.native_specs(target), some.native_specs(target), strict=True)
        chunks = tuple(Chunk(whole=whole, first=first, rows=part.shape[0]) for whole, part in narrow)
        read_bytes, memory_bytes = source.nbytes(some), _memory_bytes(some, source, target)
        yield Unit(entry=some, chunks=chunks, read_bytes=read_bytes, memory_bytes=memory_bytes, as_it_is=False)


def _rows(entry: Entry, stored: str, most_bytes: int) -> Iterator[Unit]:
    (whole,) = entry.native_specs(stored)
    rows, row_bytes = whole.shape[0], whole.nbytes // whole.shape[0]
    at_once = max(1, most_bytes // (2 * row_bytes))
    for first in range(0, rows, at_once):
        chunk = Chunk(whole=whole, first=first, rows=min(at_once, rows - first))
        nbytes = chunk.rows * row_bytes
        yield Unit(entry=entry, chunks=(chunk,), read_bytes=nbytes, memory_bytes=2 * nbytes, as_it_is=True)


def _memory_bytes(entry: Entry, source: Source, target: str) -> int:
    read, written = source.nbytes(entry), entry.nbytes(target)
    return _COPIES_OF_INPUT * read + _COPIES_OF_OUTPUT * written
