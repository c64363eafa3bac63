"""What a conversion to Orbax will do, decided from headers alone: units of work, arrays, memory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from minimax_jax.dtypes import DTYPES
from minimax_jax.errors import JobError, Problem, raise_if
from minimax_jax.io.orbax import chunk_rows
from minimax_jax.jobs.plan import RUNTIME_BYTES, require_workers
from minimax_jax.jobs.source import Source, batches
from minimax_jax.jobs.units import COPIES_OF_INPUT, COPIES_OF_OUTPUT
from minimax_jax.layout.config import MiniMaxConfig
from minimax_jax.layout.specs import Entry, TensorSpec, total_bytes

SCALED_DTYPES = ("BF16", "F32", "F8_E4M3")
"""What block-scaled weights may be stored as."""

_UNIT_BYTES = 64 * 2**20
"""Most memory of one unit where it can be split: larger units are no faster and only hold more memory."""


@dataclass(frozen=True, kw_only=True, slots=True)
class OrbaxUnit:
    """Some rows of one entry, which no other unit writes.

    Attributes:
        entry: the entry, narrowed to the experts of this unit where it groups.
        first: the first row of the native tensor; where it groups, a row is an expert.
        stop: behind the last row.
        read_bytes: bytes of tensors that are read.
        memory_bytes: peak memory of the unit.
    """

    entry: Entry
    first: int
    stop: int
    read_bytes: int
    memory_bytes: int


@dataclass(frozen=True, kw_only=True)
class OrbaxPlan:
    """A conversion, ready to run.

    Attributes:
        source: what is read.
        dtype: stored dtype of block-scaled weights.
        config: the config that is written.
        specs: the arrays that are written.
        units: the work, in order; units do not depend on each other.
        workers: how many units run at a time.
    """

    source: Source
    dtype: str
    config: MiniMaxConfig
    specs: tuple[TensorSpec, ...]
    units: tuple[OrbaxUnit, ...]
    workers: int

    @property
    def read_bytes(self) -> int:
        """Bytes of tensors that will be read."""
        return sum(unit.read_bytes for unit in self.units)

    @property
    def write_bytes(self) -> int:
        """Bytes of arrays that will be written."""
        return total_bytes(self.specs)

    @property
    def peak_bytes(self) -> int:
        """Most memory over what the process has at the start: the largest units at a time, and what jax takes once."""
        return RUNTIME_BYTES + self.workers * max(unit.memory_bytes for unit in self.units)


def plan(source: Source, dtype: str, *, max_memory_bytes: int, workers: int) -> OrbaxPlan:
    """Plan a conversion: a pure function of the source's headers. Arguments as in `minimax_jax.jobs.orbax.write`.

    Raises:
        JobError: no such dtype, no workers, or a budget that is too small for the largest unit; says what is needed.
    """
    require_workers(workers)
    if dtype not in SCALED_DTYPES:
        expected = ", ".join(SCALED_DTYPES)
        raise JobError(Problem(what="no such dtype of block-scaled weights", expected=expected, got=dtype))
    entries = tuple(source.survey.entries)
    most = max(1, min(_UNIT_BYTES, (max_memory_bytes - RUNTIME_BYTES) // workers))
    made = OrbaxPlan(
        source=source,
        dtype=dtype,
        config=source.config.replace(weight_block_size=source.config.block if dtype == "F8_E4M3" else None),
        specs=tuple(spec for entry in entries for spec in _written(entry, source, dtype)),
        units=tuple(unit for entry in entries for unit in _units(entry, source, dtype, most)),
        workers=workers,
    )
    raise_if(_over_budget(made, max_memory_bytes), JobError)
    return made


def _over_budget(made: OrbaxPlan, max_memory_bytes: int) -> Iterator[Problem]:
    if made.peak_bytes > max_memory_bytes:
        largest = max(made.units, key=lambda unit: unit.memory_bytes)
        expected = f"at least {made.peak_bytes:,} bytes with {made.workers} workers"
        what, remedy = "memory budget too small for one unit of work", "raise --max-memory, or use fewer --workers"
        got = f"{max_memory_bytes:,} bytes"
        yield Problem(what=what, key=largest.entry.native, expected=expected, got=got, remedy=remedy)


def _written(entry: Entry, source: Source, dtype: str) -> Iterator[TensorSpec]:
    return entry.native_specs(dtype if entry.row.scaled else source.survey.dtypes[entry.native])


def _units(entry: Entry, source: Source, dtype: str, most_bytes: int) -> Iterator[OrbaxUnit]:
    if not entry.row.scaled:
        yield from _rows(entry, source)
        return
    for some, first in batches(entry, _memory(entry, source, dtype), most_bytes):
        stop = first + some.experts if entry.row.grouped else entry.shape[0]
        read, memory = total_bytes(source.specs(some)), _memory(some, source, dtype)
        yield OrbaxUnit(entry=some, first=first, stop=stop, read_bytes=read, memory_bytes=memory)


def _rows(entry: Entry, source: Source) -> Iterator[OrbaxUnit]:
    """Units of whole chunks, for a tensor that is copied as it is."""
    (spec,) = source.specs(entry)
    rows = spec.shape[0]
    step = chunk_rows(spec.shape, DTYPES[spec.dtype].itemsize)
    for first in range(0, rows, step):
        stop = min(first + step, rows)
        read = spec.nbytes // rows * (stop - first)
        memory = COPIES_OF_INPUT * read  # what was read, and the chunk that is written
        yield OrbaxUnit(entry=entry, first=first, stop=stop, read_bytes=read, memory_bytes=memory)


def _memory(entry: Entry, source: Source, dtype: str) -> int:
    read, written = total_bytes(source.specs(entry)), total_bytes(_written(entry, source, dtype))
    return COPIES_OF_INPUT * read + COPIES_OF_OUTPUT * written
