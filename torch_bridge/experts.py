"""Many matrices of experts to one grouped tensor and back, on one rank: `[rows, cols]` <-> `[experts, cols, n*rows]`.

On CPU the kernels of `minimax_jax.ops.host` do it in one pass over memory, where there are any. Else each matrix is
transposed as it is: codes at one byte, before they are dequantised, and by PJRT's transposing copy, which is several
times faster than XLA's or torch's; a band of columns at a time, so that temporaries stay small. Either way it goes
straight to its place in the result, so that besides the result no more than a few matrices are in memory.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import numpy as np
import torch

from minimax_jax.dtypes import DTYPES
from minimax_jax.ops import fp8 as jitted
from minimax_jax.ops import host
from torch_bridge import fp8, memory
from torch_bridge.arrays import TORCH_NAMES, as_numpy, to_torch
from torch_bridge.fp8 import Block, Offset
from torch_bridge.kernels import cpu, kernels_for, scales_from

_WORKERS = min(4, os.cpu_count() or 1)
"""Experts in work at once on CPU: a matrix is transposed while another is dequantised by all cores."""

_BAND = 256
"""Columns of a matrix in work at once, or one block where that is more: more are no faster, and take memory."""


class Part(NamedTuple):
    """One matrix of an expert, or a slice of one.

    Attributes:
        values: `[rows, cols]`: FP8 codes, or weights of any float dtype.
        scale_inv: block scales of the whole matrix; None for weights.
        offset: row and column of `values[0, 0]` in the whole matrix.
    """

    values: torch.Tensor
    scale_inv: torch.Tensor | None
    offset: Offset


class Filling(NamedTuple):
    """One expert and where it goes.

    Attributes:
        out: `[cols, parts*rows]` of the grouped tensor.
        parts: matrices of equal shape, side by side.
    """

    out: torch.Tensor
    parts: tuple[Part, ...]


def fill(out: torch.Tensor, fillings: Iterable[Filling], block: Block) -> None:
    """Write every expert to its place: transposed, dequantised, cast to the dtype of the grouped tensor.

    Args:
        out: the grouped tensor.
        fillings: taken from the iterator one by one, and let go of one by one.
        block: rows and columns of one FP8 block.
    """
    if not fp8.on_cpu(out):  # one stream, that of the caller
        for filling in fillings:
            _fill(filling, block)
        return
    work, heap = _Work(fillings, block), memory.Heap(out.nbytes)
    with ThreadPoolExecutor(_WORKERS, thread_name_prefix="experts") as pool:
        done = [pool.submit(work.run, heap) for _ in range(_WORKERS)]
    heap.close()
    for worker in done:
        worker.result()


class _Work:
    """Fillings that several workers share, each taking the next and letting go of it before another."""

    def __init__(self, fillings: Iterable[Filling], block: Block):
        self._fillings = iter(fillings)
        self._block = block
        self._lock = threading.Lock()

    def run(self, heap: memory.Heap) -> None:
        """Fill places until none is left; an executor's own queue would hold on to what is done."""
        while True:
            nbytes = self._fill_next()
            if nbytes is None:
                return
            heap.let_go(nbytes)

    def _fill_next(self) -> int | None:
        with self._lock:
            filling = next(self._fillings, None)
        return None if filling is None else _fill(filling, self._block)


def contiguous(view: torch.Tensor) -> torch.Tensor:
    """A contiguous copy of a matrix that is a transposed view."""
    if not fp8.on_cpu(view) or view.is_contiguous():
        return view.clone(memory_format=torch.contiguous_format)
    source = as_numpy(view.T)
    kernels = kernels_for(source)
    if kernels is None:
        return to_torch(_row_major(source.T).block_until_ready())
    copy = memory.empty(view.shape, view.dtype, view.device)
    kernels.transpose((host.units(source),), host.units(as_numpy(copy)))
    return copy


def _fill(filling: Filling, block: Block) -> int:
    """Fill one place; gives the size in bytes of what it was filled with."""
    out, parts = filling
    if not fp8.on_cpu(out, *(part.values for part in parts)):
        for place, part in zip(out.chunk(len(parts), dim=1), parts, strict=True):
            place.copy_(_weights(part, out.dtype, block).T)
    elif not _fill_by_kernels(out, parts, block):
        for place, part in zip(out.chunk(len(parts), dim=1), parts, strict=True):
            _fill_by_bands(place, part, block)
    return sum(part.values.nbytes for part in parts)


def _fill_by_kernels(out: torch.Tensor, parts: tuple[Part, ...], block: Block) -> bool:
    """Fill a place in one pass over memory; False where there are no kernels, or they do not cover it."""
    target, values = as_numpy(out), [as_numpy(part.values) for part in parts]
    kernels = kernels_for(values)
    if kernels is None:
        return False
    if parts[0].scale_inv is None:
        if any(array.dtype != target.dtype for array in values):
            return False
        kernels.transpose(tuple(host.units(host.on_host(array)) for array in values), host.units(target))
        return True
    scales = [grid for part in parts if (grid := scales_from(part.scale_inv, part.offset, block)) is not None]
    if len(scales) < len(parts) or not all(map(host.ordinary, scales)):
        return False
    codes = tuple(host.bits(host.on_host(array)) for array in values)
    kernels.decode_transposed(codes, tuple(map(host.on_host, scales)), block, host.bits(target))
    return True


def _fill_by_bands(place: torch.Tensor, part: Part, block: Block) -> None:
    step = max(1, _BAND // block[1]) * block[1]
    for start in range(0, len(place), step):
        turned = _turned(_band(part, start, step, block), place.dtype, block)
        np.copyto(host.units(as_numpy(place[start : start + step])), host.units(np.asarray(turned)))


def _band(part: Part, start: int, step: int, block: Block) -> Part:
    """Columns from `start` on, a multiple of a block. Its scales are cut too: bands of equal shape share a program."""
    values, (row, col) = part.values[:, start : start + step], part.offset
    if part.scale_inv is None:
        return part._replace(values=values)
    first, rest = divmod(col + start, block[1])
    last = first + -(-(rest + values.shape[1]) // block[1])
    return Part(values, part.scale_inv[:, first:last], (row, rest))


def _weights(part: Part, dtype: torch.dtype, block: Block) -> torch.Tensor:
    if part.scale_inv is None:
        return part.values
    return fp8.dequantize(part.values, part.scale_inv, dtype, block=block, offset=part.offset)


def _turned(part: Part, dtype: torch.dtype, block: Block) -> jax.Array:
    """The weights of a part, `dtype` [cols, rows]."""
    if part.scale_inv is None:
        return _row_major(as_numpy(part.values.to(dtype)).T)
    codes, scale_inv = _row_major(as_numpy(part.values).T), as_numpy(part.scale_inv.cpu()).T
    name = TORCH_NAMES[dtype]
    return jitted.dequantize(codes, scale_inv, DTYPES[name], block=block[::-1], offset=part.offset[::-1])


def _row_major(matrix: np.ndarray[Any, Any]) -> jax.Array:
    """A numpy matrix in row-major order: a copy, perhaps still under way, unless it has that order already."""
    turned: jax.Array = jax.device_put(matrix, cpu())
    return turned
