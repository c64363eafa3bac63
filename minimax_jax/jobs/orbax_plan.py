"""What a conversion to Orbax will do, decided from headers alone: units of work, arrays, memory."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from minimax_jax.dtypes import DTYPES
from minimax_jax.errors import JobError, LayoutError, Problem, RequestError, raise_if
from minimax_jax.io.orbax_rows import chunk_rows
from minimax_jax.jobs.budget import over_budget, peak_bytes, require_workers, share_bytes
from minimax_jax.jobs.source import Source, batches, layout_specs
from minimax_jax.jobs.streamed import StreamedPlan
from minimax_jax.jobs.targets import no_place_for_fp8
from minimax_jax.jobs.units import COPIES_OF_INPUT, COPIES_OF_OUTPUT
from minimax_jax.layout.arrangement import Arrangement, arrange
from minimax_jax.layout.config import MiniMaxConfig
from minimax_jax.layout.forms import FORMS, HOLDING_FP8, Layout
from minimax_jax.layout.specs import Entry, TensorSpec, total_bytes

SCALED_DTYPES = ("BF16", "F32", "F8_E4M3")
"""What block-scaled weights may be stored as."""

_UNIT_BYTES = 64 * 2**20
"""Most memory of one unit where it can be split: larger units are no faster and only hold more memory."""

_ROW_COPIES = 3
"""Of rows that are copied: what was read, the same in the order of another layout, and the chunk that is written."""


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

    @property
    def rows(self) -> int | None:
        """How many rows of an entry that is copied; None of one that is converted, whose experts or all it is."""
        return None if self.entry.row.scaled else self.stop - self.first


@dataclass(frozen=True, kw_only=True)
class OrbaxPlan:
    """A conversion, ready to run.

    Attributes:
        source: what is read.
        layout: whose names and axes the arrays have.
        dtype: stored dtype of block-scaled weights.
        config: the config that is written.
        specs: the arrays that are written.
        chunks: shape of one chunk of arrays that are not stored by rows of their leading axis, by name.
        units: the work, in order; units do not depend on each other, and no two write to one chunk of these.
        workers: how many units run at a time.
    """

    source: Source
    layout: Layout
    dtype: str
    config: MiniMaxConfig
    specs: tuple[TensorSpec, ...]
    chunks: Mapping[str, tuple[int, ...]]
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
        return peak_bytes(self.units, self.workers)

    def boxes(self, unit: OrbaxUnit) -> dict[str, tuple[slice, ...]]:
        """What a unit writes: a box of each of some arrays, by name."""
        entry = unit.entry
        if self.layout in FORMS:
            place = arrange(entry, self.layout, rows=unit.rows)
            return dict.fromkeys(place.names, place.region(unit.first))
        rows = {
            spec.key: unit.rows or spec.shape[0] for spec in entry.native_specs(_stored(entry, self.source, self.dtype))
        }
        return {key: (slice(unit.first, unit.first + count),) for key, count in rows.items()}

    @property
    def division(self) -> bytes:
        """A text of the arrays and their chunks, the same for plans that write the same files."""
        return "\n".join(f"{spec} {self.chunks.get(spec.key)}" for spec in self.specs).encode()


def plan(source: Source, dtype: str, *, max_memory_bytes: int, workers: int, layout: Layout = "native") -> OrbaxPlan:
    """Plan a conversion: a pure function of the source's headers. Arguments as in `minimax_jax.jobs.orbax.write`.

    Raises:
        RequestError: no such dtype (or none in the layout), or no workers.
        JobError: a budget that is too small for the largest unit; says what is needed.
        LayoutError: the layout stacks layers, and those of the source differ in dtype.
    """
    require_workers(workers)
    if dtype == "F8_E4M3" and layout not in HOLDING_FP8:
        raise RequestError(no_place_for_fp8(layout))
    if dtype not in SCALED_DTYPES:
        expected = ", ".join(SCALED_DTYPES)
        raise RequestError(Problem(what="no such dtype of block-scaled weights", expected=expected, got=dtype))
    entries = tuple(source.survey.entries)
    most = max(1, min(_UNIT_BYTES, share_bytes(max_memory_bytes, workers)))
    specs, chunks = _arrays(entries, source, layout, dtype)
    made = OrbaxPlan(
        source=source,
        layout=layout,
        dtype=dtype,
        config=source.config.replace(weight_block_size=source.config.block if dtype == "F8_E4M3" else None),
        specs=specs,
        chunks=chunks,
        units=tuple(unit for entry in entries for unit in _units(entry, source, layout, dtype, most)),
        workers=workers,
    )
    largest = max(made.units, key=lambda unit: unit.memory_bytes)
    raise_if(over_budget(largest.memory_bytes, max_memory_bytes, workers, key=largest.entry.native), JobError)
    return made


def foresee(
    source: Source, *, dtype: str, max_memory_bytes: int, workers: int, to: str = "orbax", layout: Layout = "native"
) -> StreamedPlan:
    """The same in numbers, as `minimax_jax.jobs.streamed` wants them."""
    made = plan(source, dtype, max_memory_bytes=max_memory_bytes, workers=workers, layout=layout)
    return StreamedPlan(
        source=source,
        to=to,
        dtype=dtype,
        units=len(made.units),
        tensors=len(made.specs),
        read_bytes=made.read_bytes,
        write_bytes=made.write_bytes,
        peak_bytes=made.peak_bytes,
        workers=workers,
    )


foresee_maxtext = functools.partial(foresee, to="maxtext", layout="maxtext")
foresee_maxtext_unscanned = functools.partial(foresee, to="maxtext-unscanned", layout="maxtext-unscanned")


def _stored(entry: Entry, source: Source, dtype: str) -> str:
    return dtype if entry.row.scaled else source.survey.dtypes[entry.native]


def _arrays(
    entries: Iterable[Entry], source: Source, layout: Layout, dtype: str
) -> tuple[tuple[TensorSpec, ...], dict[str, tuple[int, ...]]]:
    """The arrays to write, a stack of layers once, and the chunks of those of further layouts."""
    specs: dict[str, TensorSpec] = {}
    chunks: dict[str, tuple[int, ...]] = {}
    unlike: list[Problem] = []
    for entry in entries:
        stored = _stored(entry, source, dtype)
        if layout not in FORMS:
            specs |= {spec.key: spec for spec in layout_specs(entry, layout, stored)}
            continue
        place = arrange(entry, layout)
        for name in place.names:
            spec = specs.setdefault(name, TensorSpec(name, place.whole_shape, stored))
            chunks[name] = _chunk(place, DTYPES[stored].itemsize)
            if spec.dtype != stored:
                unlike.append(_unlike(name, spec.dtype, stored))
    raise_if(unlike, LayoutError)
    return tuple(specs.values()), chunks


def _unlike(name: str, expected: str, got: str) -> Problem:
    what, remedy = "layers differ in dtype: they cannot be stacked", "take a target that does not stack layers"
    return Problem(what=what, key=name, expected=expected, got=got, remedy=remedy)


def _chunk(place: Arrangement, itemsize: int) -> tuple[int, ...]:
    """One layer of a stack, and of that some leading rows of the native tensor (experts, where it groups)."""
    chunk = list(place.whole_shape)
    if place.layer_axis is not None:
        chunk[place.layer_axis] = 1
    if place.row_axis is not None:
        rows = chunk[place.row_axis]
        chunk[place.row_axis] = chunk_rows((rows, math.prod(chunk) // rows), itemsize)
    return tuple(chunk)


def _units(entry: Entry, source: Source, layout: Layout, dtype: str, most_bytes: int) -> Iterator[OrbaxUnit]:
    if not entry.row.scaled:
        yield from _rows(entry, source, layout)
        return
    for some, first in batches(entry, _memory(entry, source, layout, dtype), most_bytes):
        stop = first + some.experts if entry.row.grouped else entry.shape[0]
        read, memory = source.nbytes(some), _memory(some, source, layout, dtype)
        yield OrbaxUnit(entry=some, first=first, stop=stop, read_bytes=read, memory_bytes=memory)


def _rows(entry: Entry, source: Source, layout: Layout) -> Iterator[OrbaxUnit]:
    """Units of whole chunks, for a tensor whose numbers are copied as they are."""
    (spec,) = source.specs(entry)
    rows, itemsize = entry.shape[0], DTYPES[spec.dtype].itemsize
    step = chunk_rows(entry.shape, itemsize)
    if layout in FORMS:
        place = arrange(entry, layout)
        step = rows if place.row_axis is None else _chunk(place, itemsize)[place.row_axis]
    for first in range(0, rows, step):
        stop = min(first + step, rows)
        read = spec.nbytes // rows * (stop - first)
        memory = _ROW_COPIES * read
        yield OrbaxUnit(entry=entry, first=first, stop=stop, read_bytes=read, memory_bytes=memory)


def _memory(entry: Entry, source: Source, layout: Layout, dtype: str) -> int:
    read, written = source.nbytes(entry), entry.nbytes(_stored(entry, source, dtype))
    turned = sum(each in FORMS for each in (source.survey.layout, layout))  # by one more copy each
    return COPIES_OF_INPUT * read + (COPIES_OF_OUTPUT + turned) * written
