"""A checkpoint as native tensors, some rows or experts at a time: what is streamed elsewhere without being held."""

from __future__ import annotations

import collections
import itertools
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

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
from minimax_jax.leaves import recast
from minimax_jax.ops.scaled import BlockScaled
from torch_bridge import memory
from torch_bridge.arrays import to_torch

_UNIT_BYTES = 2**26
"""Most memory of one unit where it can be split: larger units are no faster and only hold more memory."""

_COPIES_OF_INPUT, _COPIES_OF_OUTPUT = 2, 3
"""What a conversion holds at its peak: what it read and its device copy; its output and two temporaries like it."""

_FP8 = "F8_E4M3"

_T = TypeVar("_T")


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


class Made(NamedTuple):
    """What comes of a unit.

    Attributes:
        tensors: new, one for each chunk.
        kept: of weights that were quantised, by Hugging Face name, whether they kept their source scales.
    """

    tensors: list[torch.Tensor]
    kept: Mapping[str, bool]


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
    """Makes the tensors of units; safe to call from several threads."""

    def __init__(self, source: Source, reader: Reader, dtype: str):
        self._source, self._reader, self._dtype = source, reader, dtype

    def make(self, unit: Unit) -> Made:
        """The tensors of the chunks of a unit.

        Raises:
            FormatError: the source changed or ends too early while it is read.
            NumericError: NaN or infinity in weights to be quantised.
        """
        first = unit.chunks[0].first
        if unit.as_it_is:
            (spec,) = self._source.specs(unit.entry)
            rows = (first, first + unit.chunks[0].rows)
            return Made([to_torch(self._reader.read(self._source.checkpoint.tensors[spec.key], *rows))], {})
        keep = self._dtype == _FP8
        kept: Mapping[str, bool] = {}
        leaf = read_leaf(self._source, self._reader, unit.entry, first, None if keep else DTYPES[self._dtype])
        if keep and not isinstance(leaf, BlockScaled):
            leaf, kept = quantize_leaf(unit.entry, leaf, self._source_scales(unit))
        arrays = recast(unit.entry, leaf, DTYPES[self._dtype])
        return Made([to_torch(arrays[chunk.whole.key]) for chunk in unit.chunks], kept)

    def _source_scales(self, unit: Unit) -> Any:
        info = self._source.sidecar.get(unit.entry.native + SCALE_SUFFIX)
        return None if info is None else self._reader.read(info, *rows_of(unit.entry, unit.chunks[0].first))


def in_order(make: Callable[[Unit], _T], units: Iterable[Unit], workers: int) -> Generator[tuple[Unit, _T], None, None]:
    """The units with what is made of them, in order; `workers` of them are made ahead, on threads.

    Raises:
        Exception: as `make`.
    """
    pool = ThreadPoolExecutor(workers, thread_name_prefix="convert")
    ahead: collections.deque[tuple[Unit, Future[_T]]] = collections.deque()
    left = iter(units)
    try:
        ahead.extend((unit, pool.submit(make, unit)) for unit in itertools.islice(left, workers))
        while ahead:
            unit, made = ahead.popleft()
            yield unit, made.result()
            del made
            memory.return_freed()
            ahead.extend((unit, pool.submit(make, unit)) for unit in itertools.islice(left, 1))
    finally:
        pool.shutdown(cancel_futures=True)


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
