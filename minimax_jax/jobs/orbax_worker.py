"""Executes the units of a conversion to Orbax: reads, converts, writes, and notes what is done."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from minimax_jax.dtypes import DTYPES
from minimax_jax.errors import FormatError
from minimax_jax.io import points
from minimax_jax.io.journal import Journal, digest
from minimax_jax.io.orbax_rows import Rows
from minimax_jax.io.reader import Reader
from minimax_jax.jobs.heap import give_back
from minimax_jax.jobs.orbax_plan import OrbaxPlan, OrbaxUnit
from minimax_jax.jobs.quantize import quantize_leaf
from minimax_jax.jobs.read import read_leaf, read_rows, rows_of
from minimax_jax.jobs.records import DIGEST, Record, record_of
from minimax_jax.layout.forms import FORMS
from minimax_jax.layout.table import SCALE_SUFFIX
from minimax_jax.leaves import arranged, recast
from minimax_jax.ops.checks import Array
from minimax_jax.ops.scaled import BlockScaled

LAYOUT = "layout"
"""What a record says of the layout that was filled."""

_LARGE_BYTES = 2**20
_M_MMAP_THRESHOLD = -3  # of glibc's malloc.h


@functools.cache
def keep_large_buffers_apart() -> None:
    """Have the C library map each large buffer by itself, so that its pages go back to the system when it is freed.

    By default glibc takes to the heap what it has seen freed, up to 32 MiB. TensorStore frees on threads of its own
    what it wrote, and the gaps left among such buffers came to 80 MB in five layers, and more with each. Holds for the
    whole process; does nothing without glibc.
    """
    getattr(ctypes.CDLL(None), "mallopt", lambda *_: 0)(_M_MMAP_THRESHOLD, _LARGE_BYTES)


class OrbaxWorker:
    """Executes units; safe to call from several threads.

    Attributes:
        records: what is done, by the name of the unit.
    """

    def __init__(
        self,
        plan: OrbaxPlan,
        reader: Reader,
        arrays: Mapping[str, Rows],
        journal: Journal,
        found: Mapping[str, Record],
        layout: str,
    ):
        """Ready to work.

        Args:
            plan: what to do.
            reader: of its source.
            arrays: those of the plan, by name.
            journal: where units that are done are noted.
            found: the records of an earlier process, which count only where they prove true.
            layout: the digest of the layout that is filled, noted with each unit.
        """
        self.plan, self.reader, self.arrays, self.journal = plan, reader, arrays, journal
        self.records: dict[str, Record] = {}
        self._found, self._layout = found, layout
        keep_large_buffers_apart()

    def do(self, unit: OrbaxUnit) -> None:
        """Do one unit, or find it done."""
        name = self.name(unit)
        record = self._found.get(name)
        if record is not None and self.holds(unit, record):
            self.records[name] = record
        else:
            self.records[name] = self._make(unit, name)
        give_back(unit.memory_bytes)

    def name(self, unit: OrbaxUnit) -> str:
        """What the journal calls a unit: its entry and rows."""
        return f"{unit.entry.native} {unit.first}+{unit.stop - unit.first}"

    def holds(self, unit: OrbaxUnit, record: Record) -> bool:
        """Whether the arrays hold what a record says; they are read for it."""
        boxes = self.plan.boxes(unit).items()
        try:
            found = digest(np.ascontiguousarray(self.arrays[key].read_region(region)) for key, region in boxes)
        except FormatError:  # chunks are missing, or the disk does not give them
            return False
        return found == record.get(DIGEST)

    def _make(self, unit: OrbaxUnit, name: str) -> Record:
        tensors, kept = self._converted(unit) if unit.entry.row.scaled else (self._copied(unit), {})
        points.reach("before a write")
        record = {**record_of(name, digest(self._written(unit, tensors)), kept), LAYOUT: self._layout}
        self.journal.note(record)
        return record

    def _written(self, unit: OrbaxUnit, native: Mapping[str, Array]) -> Iterator[npt.NDArray[Any]]:
        """Write stored native tensors, as the layout has them; each box that is on the disk."""
        arrays: Mapping[str, Array] = {key: np.asarray(tensor) for key, tensor in native.items()}
        if self.plan.layout in FORMS:
            arrays = arranged(unit.entry, arrays, self.plan.layout, rows=unit.rows)
        for key, region in self.plan.boxes(unit).items():
            box = np.ascontiguousarray(arrays[key])
            self.arrays[key].write_region(region, box)
            yield box

    def _copied(self, unit: OrbaxUnit) -> Mapping[str, Array]:
        rows = read_rows(self.plan.source, self.reader, unit.entry, unit.first, unit.stop)
        return {unit.entry.native: rows}

    def _converted(self, unit: OrbaxUnit) -> tuple[Mapping[str, Array], Mapping[str, bool]]:
        entry, fp8, dtype = unit.entry, self.plan.dtype == "F8_E4M3", DTYPES[self.plan.dtype]
        kept: Mapping[str, bool] = {}
        leaf = read_leaf(self.plan.source, self.reader, entry, unit.first, None if fp8 else dtype)
        if fp8 and not isinstance(leaf, BlockScaled):
            leaf, kept = quantize_leaf(entry, leaf, self._source_scales(unit))
        return recast(entry, leaf, dtype), kept

    def _source_scales(self, unit: OrbaxUnit) -> npt.NDArray[Any] | None:
        info = self.plan.source.sidecar.get(unit.entry.native + SCALE_SUFFIX)
        return None if info is None else self.reader.read(info, *rows_of(unit.entry, unit.first))
