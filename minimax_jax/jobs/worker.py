"""Executes the units of a plan: reads, converts, writes, and notes what is done."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from minimax_jax.dtypes import DTYPES
from minimax_jax.errors import JobError, Problem
from minimax_jax.io import points
from minimax_jax.io.journal import Journal, digest
from minimax_jax.io.reader import Reader
from minimax_jax.io.writer import Writer
from minimax_jax.jobs.heap import give_back
from minimax_jax.jobs.plan import Plan
from minimax_jax.jobs.quantize import quantize_leaf
from minimax_jax.jobs.read import read_leaf, read_rows, rows_of
from minimax_jax.jobs.records import DIGEST, Record, record_of
from minimax_jax.jobs.units import Convert, Copy, GroupScales, Unit
from minimax_jax.layout.forms import FORMS
from minimax_jax.layout.table import SCALE_SUFFIX
from minimax_jax.leaves import arranged, emit, group_scales, recast
from minimax_jax.ops.host import backend
from minimax_jax.ops.scaled import BlockScaled
from minimax_jax.ops.workspace import Workspaces, empty

HostArray: TypeAlias = npt.NDArray[Any]


class Worker:
    """Executes units; safe to call from several threads.

    Attributes:
        records: what is done, by the name of the unit.
    """

    def __init__(self, plan: Plan, reader: Reader, writer: Writer, journal: Journal, found: Mapping[str, Record]):
        """Ready to work; `found` are the records of an earlier process, which count only where they prove true."""
        self.plan, self.reader, self.writer, self.journal = plan, reader, writer, journal
        self.records: dict[str, Record] = {}
        self._found = found
        self._workspaces = Workspaces(max((unit.memory_bytes for unit in plan.units), default=0))

    def do(self, unit: Unit) -> None:
        """Do one unit, or find it done."""
        name = self.name(unit)
        record = self._found.get(name)
        if record is not None and self.holds(unit, record):
            self.adopt(unit, record)
        else:
            with self._workspaces.mine().holding():
                self.records[name] = self._make(unit, name)
            if backend() == "xla":
                give_back(unit.memory_bytes)

    def name(self, unit: Unit) -> str:
        """What the journal calls a unit: where its output begins, and how much it is."""
        outputs = self.plan.outputs(unit)
        return f"{outputs[0].key} {outputs[0].offset_bytes}+{sum(out.nbytes for out in outputs)}"

    def holds(self, unit: Unit, record: Record) -> bool:
        """Whether the output files hold what a record says; they are read for it."""
        written = (self.writer.read(out.key, out.nbytes, out.offset_bytes) for out in self.plan.outputs(unit))
        return digest(written) == record.get(DIGEST)

    def adopt(self, unit: Unit, record: Record) -> None:
        """Count a unit as done that this process did not do."""
        for out in self.plan.outputs(unit):
            self.writer.adopt(out.key, out.nbytes, out.offset_bytes)
        self.records[self.name(unit)] = record

    def _make(self, unit: Unit, name: str) -> Record:
        kept: dict[str, bool] = {}
        arrays = list(self._arrays(unit, kept))
        for out, array in zip(self.plan.outputs(unit), arrays, strict=True):
            points.reach("before a write")
            if array.nbytes != out.nbytes:
                raise JobError(Problem(what="output of another size than planned", key=out.key))
            self.writer.write(out.key, array, out.offset_bytes)
        record = record_of(name, digest(arrays), kept)
        self.journal.note(record)
        return record

    def _arrays(self, unit: Unit, kept: dict[str, bool]) -> Iterator[HostArray]:
        match unit:
            case Copy():
                buffer = empty((unit.read_bytes,), np.uint8)
                self.reader.read_into(unit.info.file, unit.info.start + unit.start, buffer)
                yield buffer
            case GroupScales():
                infos = self.plan.source.checkpoint.tensors
                scales = {spec.key: self.reader.read(infos[spec.key]) for spec in unit.entry.scale_specs()}
                yield np.asarray(group_scales(unit.entry, scales))
            case Convert():
                yield from self._convert(unit, kept)

    def _convert(self, unit: Convert, kept: dict[str, bool]) -> Iterator[HostArray]:
        entry, target = unit.entry, self.plan.target
        if unit.rows is not None:
            yield read_rows(self.plan.source, self.reader, entry, unit.first, unit.first + unit.rows)
            return
        keep = target.layout == "hf" or target.dtype == "F8_E4M3"
        dtype = DTYPES[target.dtype]
        leaf = read_leaf(self.plan.source, self.reader, entry, unit.first, None if keep else dtype)
        if target.dtype == "F8_E4M3" and not isinstance(leaf, BlockScaled):
            leaf, same = quantize_leaf(entry, leaf, self._source_scales(unit))
            kept.update(same)
        out = (emit if target.layout == "hf" else recast)(entry, leaf, dtype)
        if target.layout in FORMS:
            out = arranged(entry, {key: np.asarray(tensor) for key, tensor in out.items()}, target.layout)
        yield from (np.ascontiguousarray(np.asarray(out[written.key])) for written in self.plan.outputs(unit))

    def _source_scales(self, unit: Convert) -> HostArray | None:
        info = self.plan.source.sidecar.get(unit.entry.native + SCALE_SUFFIX)
        return None if info is None else self.reader.read(info, *rows_of(unit.entry, unit.first), empty=empty)
