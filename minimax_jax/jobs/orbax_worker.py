"""Executes the units of a conversion to Orbax: reads, converts, writes."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from minimax_jax.dtypes import DTYPES
from minimax_jax.io import points
from minimax_jax.io.orbax_rows import Rows
from minimax_jax.io.reader import Reader
from minimax_jax.jobs.heap import give_back
from minimax_jax.jobs.orbax_plan import OrbaxPlan, OrbaxUnit
from minimax_jax.jobs.quantize import quantize_leaf
from minimax_jax.jobs.read import read_leaf, read_rows, rows_of
from minimax_jax.layout.arrangement import arrange
from minimax_jax.layout.forms import FORMS
from minimax_jax.layout.table import SCALE_SUFFIX
from minimax_jax.leaves import arranged, recast
from minimax_jax.ops.checks import Array
from minimax_jax.ops.scaled import BlockScaled

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
    """Executes units; safe to call from several threads."""

    def __init__(self, plan: OrbaxPlan, reader: Reader, arrays: Mapping[str, Rows]):
        """Ready to work; `arrays` are those of the plan, by name."""
        self.plan, self.reader, self.arrays = plan, reader, arrays
        keep_large_buffers_apart()

    def do(self, unit: OrbaxUnit) -> Mapping[str, bool]:
        """Do one unit; for weights that it quantised, by Hugging Face name, whether they kept their source scales."""
        tensors, kept = self._converted(unit) if unit.entry.row.scaled else (self._copied(unit), {})
        self._write(unit, tensors)
        del tensors
        give_back(unit.memory_bytes)
        return kept

    def _write(self, unit: OrbaxUnit, native: Mapping[str, Array]) -> None:
        """Write stored native tensors, as the layout has them."""
        points.reach("before a write")
        if self.plan.layout not in FORMS:
            for key, tensor in native.items():
                self.arrays[key].write(unit.first, np.asarray(tensor))
            return
        rows = None if unit.entry.row.grouped else unit.stop - unit.first
        region = arrange(unit.entry, self.plan.layout, rows=rows).region(unit.first)
        held = {key: np.asarray(tensor) for key, tensor in native.items()}
        for name, box in arranged(unit.entry, held, self.plan.layout, rows=rows).items():
            self.arrays[name].write_region(region, np.ascontiguousarray(box))

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
