"""What a conversion will do, decided from headers alone: units of work, output files, memory and disk."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from minimax_jax.bulk import without_collector
from minimax_jax.display import Displayed
from minimax_jax.errors import JobError, raise_if
from minimax_jax.io.header import TensorInfo
from minimax_jax.io.shards import DEFAULT_SHARD_BYTES, ShardLayout, TensorOut, lay_out
from minimax_jax.jobs.budget import (
    DEFAULT_WORKERS,
    LEAST_UNIT_BYTES,
    over_budget,
    peak_bytes,
    require_workers,
    share_bytes,
)
from minimax_jax.jobs.scales import Remark, scale_remarks, scales_of
from minimax_jax.jobs.source import SIDECAR_STEM, Source, batches, layout_specs, same_form, sidecar_metadata
from minimax_jax.jobs.units import COPIES_OF_INPUT, COPIES_OF_OUTPUT, Convert, Copy, GroupScales, Output, Unit
from minimax_jax.layout.check import Layout
from minimax_jax.layout.config import MiniMaxConfig
from minimax_jax.layout.forms import FORMS
from minimax_jax.layout.specs import Entry, TensorSpec, total_bytes
from minimax_jax.layout.table import SCALE_SUFFIX

DEFAULT_MEMORY_BYTES = 4 * 2**30

_UNIT_BYTES = 64 * 2**20
"""Most memory of one unit where it can be split: larger units are no faster and only hold more memory."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Target:
    """The form to convert to.

    Attributes:
        layout: whose names the output has.
        dtype: stored dtype of block-scaled weights (`F8_E4M3`, `BF16`, `F32`); other tensors keep theirs.
    """

    layout: Layout
    dtype: str

    @property
    def keeps_scales(self) -> bool:
        """Whether the block scales of an FP8 source have a place beside float weights: the sidecar."""
        return self.layout == "native"


@dataclass(frozen=True, kw_only=True, repr=False)
class Plan(Displayed):
    """A conversion, ready to run.

    Attributes:
        source: what is read.
        target: the form that is written.
        config: the config that is written.
        units: the work, in order; units do not depend on each other.
        shards: the output files.
        sidecar: the output file of source scales; none where the output is FP8 or the source is not.
        workers: how many units run at a time.
    """

    source: Source
    target: Target
    config: MiniMaxConfig
    units: tuple[Unit, ...]
    shards: tuple[ShardLayout, ...]
    sidecar: tuple[ShardLayout, ...]
    workers: int

    @property
    def read_bytes(self) -> int:
        """Bytes of tensors that will be read."""
        return sum(unit.read_bytes for unit in self.units)

    @property
    def write_bytes(self) -> int:
        """Bytes of files that will be written, side files apart: the disk that is needed."""
        return sum(shard.file_bytes for shard in (*self.shards, *self.sidecar))

    @property
    def peak_bytes(self) -> int:
        """Most memory over what the process has at the start: the largest units at a time, and what jax takes once."""
        return peak_bytes(self.units, self.workers)

    @property
    def to(self) -> str:
        """The layout that is written."""
        return self.target.layout

    @property
    def dtype(self) -> str:
        """Stored dtype of block-scaled weights in the output."""
        return self.target.dtype

    @property
    def tensors(self) -> int:
        """How many tensors will be written, those of the sidecar apart."""
        return sum(len(shard.tensors) for shard in self.shards)

    @property
    def remarks(self) -> tuple[Remark, ...]:
        """What there is to know beforehand."""
        return tuple(scale_remarks(self.source, self.target.dtype, beside=self.target.keeps_scales))

    def views(self) -> Iterable[Any]:
        """What there is to look at."""
        from minimax_jax.jobs.report import plan_view

        return plan_view(self)

    def outputs(self, unit: Unit) -> tuple[Output, ...]:
        """What a unit writes, in the order in which it does."""
        match unit:
            case Copy():
                return (Output(key=unit.key, offset_bytes=unit.start, nbytes=unit.stop - unit.start),)
            case GroupScales():
                return (_rows_out(unit.entry.native + SCALE_SUFFIX, unit.read_bytes, unit),)
            case Convert():
                specs = _written(unit.entry, self.source, self.target)
                if unit.rows is not None:
                    return tuple(_part_out(spec, unit.first, unit.rows) for spec in specs)
                if self.target.layout != "hf":
                    return tuple(_rows_out(spec.key, spec.nbytes, unit) for spec in specs)
                return tuple(Output(key=spec.key, offset_bytes=0, nbytes=spec.nbytes) for spec in specs)


@without_collector
def plan(
    source: Source,
    target: Target,
    *,
    max_memory_bytes: int = DEFAULT_MEMORY_BYTES,
    workers: int = DEFAULT_WORKERS,
    shard_bytes: int = DEFAULT_SHARD_BYTES,
) -> Plan:
    """Plan a conversion: a pure function of the source's headers.

    Args:
        source: an opened checkpoint.
        target: the form to convert to.
        max_memory_bytes: budget over what the process has at the start: for all units that run at a time, and what
            jax takes once.
        workers: how many units run at a time.
        shard_bytes: most bytes of tensor data in one output file.

    Raises:
        JobError: the budget is too small for the largest unit; says what is needed. No shard size.
        RequestError: no workers.
    """
    require_workers(workers)
    most = max(LEAST_UNIT_BYTES, min(share_bytes(max_memory_bytes, workers), _UNIT_BYTES))
    entries = tuple(source.survey.entries)
    outputs = [spec for entry in entries for spec in _written(entry, source, target)]
    beside = target.keeps_scales and target.dtype != "F8_E4M3"
    kept = [entry for entry in entries if beside and scales_of(entry, source)]
    weights = (_units(entry, source, target, most) for entry in entries)
    scales = (_scale_units(entry, source, most) for entry in kept)
    made = Plan(
        source=source,
        target=target,
        config=source.config.replace(weight_block_size=source.config.block if target.dtype == "F8_E4M3" else None),
        units=tuple(itertools.chain(*weights, *scales)),
        shards=lay_out([_out(spec) for spec in outputs], shard_bytes=shard_bytes),
        sidecar=_sidecar(kept, source),
        workers=workers,
    )
    largest = max(unit.memory_bytes for unit in made.units)
    raise_if(over_budget(largest, max_memory_bytes, workers), JobError)
    return made


def _stored_dtype(entry: Entry, source: Source, target: Target) -> str:
    return target.dtype if entry.row.scaled else source.survey.dtypes[entry.native]


def _written(entry: Entry, source: Source, target: Target) -> Iterator[TensorSpec]:
    return layout_specs(entry, target.layout, _stored_dtype(entry, source, target))


def _rows_out(key: str, nbytes: int, unit: Convert | GroupScales) -> Output:
    """The experts of a unit in a tensor `[experts, ...]`."""
    return Output(key=key, offset_bytes=unit.first * nbytes // unit.entry.experts, nbytes=nbytes)


def _part_out(spec: TensorSpec, first: int, rows: int) -> Output:
    """Rows of a tensor."""
    row_bytes = spec.nbytes // spec.shape[0]
    return Output(key=spec.key, offset_bytes=first * row_bytes, nbytes=rows * row_bytes)


def _sidecar(entries: list[Entry], source: Source) -> tuple[ShardLayout, ...]:
    if not entries:
        return ()
    tensors = [TensorOut(key=entry.native + SCALE_SUFFIX, dtype="F32", shape=entry.grid) for entry in entries]
    metadata = sidecar_metadata(source.config)
    return lay_out(tensors, shard_bytes=total_bytes(tensors), metadata=metadata, stem=SIDECAR_STEM)


def _units(entry: Entry, source: Source, target: Target, most_bytes: int) -> Iterator[Unit]:
    alike = same_form(entry, source.survey.layout, target.layout)
    if alike and source.survey.dtypes[entry.native] == _stored_dtype(entry, source, target):
        yield from _copies(entry, source, target, most_bytes)
        return
    if not entry.row.scaled:
        yield from _row_units(entry, source, target, most_bytes)
        return
    read, memory = source.nbytes(entry), _memory(entry, source, target)
    for some, first in batches(entry, memory, most_bytes):
        share = {
            "read_bytes": read * some.experts // entry.experts,
            "memory_bytes": memory * some.experts // entry.experts,
        }
        yield Convert(entry=some, first=first, **share)


def _row_units(entry: Entry, source: Source, target: Target, most_bytes: int) -> Iterator[Convert]:
    """Some rows at a time of a tensor that one of the layouts has in another order."""
    count, read, memory = entry.shape[0], source.nbytes(entry), _memory(entry, source, target)
    step = max(1, most_bytes * count // memory)
    for first in range(0, count, step):
        rows = min(step, count - first)
        share = {"read_bytes": read * rows // count, "memory_bytes": memory * rows // count}
        yield Convert(entry=entry, first=first, rows=rows, **share)


def _scale_units(entry: Entry, source: Source, most_bytes: int) -> Iterator[Unit]:
    """The units that carry an entry's block scales to the sidecar."""
    key = entry.native + SCALE_SUFFIX
    info = source.sidecar.get(key) or source.checkpoint.tensors.get(key)
    if info is None:
        whole = GroupScales(entry=entry, first=0)
        yield from (GroupScales(entry=some, first=n) for some, n in batches(entry, whole.memory_bytes, most_bytes))
    else:
        yield from _pieces(info, key, most_bytes)


def _copies(entry: Entry, source: Source, target: Target, most_bytes: int) -> Iterator[Copy]:
    for read, written in zip(source.specs(entry), _written(entry, source, target), strict=True):
        yield from _pieces(source.checkpoint.tensors[read.key], written.key, most_bytes)


def _pieces(info: TensorInfo, key: str, most_bytes: int) -> Iterator[Copy]:
    for start in range(0, info.nbytes, most_bytes):
        yield Copy(info=info, key=key, start=start, stop=min(start + most_bytes, info.nbytes))


def _memory(entry: Entry, source: Source, target: Target) -> int:
    read, written = source.nbytes(entry), entry.nbytes(_stored_dtype(entry, source, target))
    turned = sum(layout in FORMS for layout in (source.survey.layout, target.layout))  # by one more copy each
    return COPIES_OF_INPUT * read + (COPIES_OF_OUTPUT + turned) * written


def _out(spec: TensorSpec) -> TensorOut:
    return TensorOut(key=spec.key, dtype=spec.dtype, shape=spec.shape)
