"""The CPU kernels of `minimax_jax` on matrices in torch's memory, where there are kernels and they cover these."""

from __future__ import annotations

import functools
from types import ModuleType
from typing import Any, TypeAlias

import jax
import numpy as np
import torch

from minimax_jax.ops import host
from torch_bridge import memory
from torch_bridge.arrays import as_numpy

Grid: TypeAlias = np.ndarray[Any, Any]

WEIGHTS = (torch.float32, torch.bfloat16, torch.float16)
"""Dtypes that weights may have."""

_BANDS = 8
"""Pieces of a matrix that cores share out among themselves."""


@functools.cache
def cpu() -> jax.Device:
    """JAX's CPU, whatever else it has."""
    return jax.local_devices(backend="cpu")[0]


def kernels_for(arrays: Any) -> ModuleType | None:
    """The kernels, if they are to be used for these numpy arrays."""
    with jax.default_device(cpu()):
        return host.kernels_for(arrays)


def scales_from(scale_inv: torch.Tensor | None, offset: tuple[int, int], block: tuple[int, int]) -> Grid | None:
    """Scales from row and column `offset` of the matrix on; None where a block does not begin there."""
    (row, row_in_block), (col, col_in_block) = map(divmod, offset, block)
    if scale_inv is None or row_in_block or col_in_block:
        return None
    return as_numpy(scale_inv.cpu())[row:, col:]


def decoded(
    values: torch.Tensor,
    scale_inv: torch.Tensor,
    dtype: torch.dtype,
    block: tuple[int, int],
    offset: tuple[int, int],
) -> torch.Tensor | None:
    """Weights `dtype` [rows, cols] of contiguous codes, on all cores; None where the kernels do not cover them."""
    if values.ndim != 2 or dtype not in WEIGHTS:
        return None
    codes, grid = as_numpy(values), scales_from(scale_inv, offset, block)
    kernels = kernels_for(codes)
    if kernels is None or grid is None or not host.ordinary(grid):
        return None
    rows, cols = (-(-size // of) for size, of in zip(values.shape, block, strict=True))
    grid, codes = host.on_host(grid[:rows, :cols]), host.bits(host.on_host(codes))
    out = memory.empty(values.shape, dtype, values.device)
    target, step = host.bits(as_numpy(out)), max(1, rows // _BANDS)
    host.run(
        functools.partial(kernels.decode, codes[rows_of], grid[first : first + step], block, 1, target[rows_of])
        for first in range(0, rows, step)
        for rows_of in [slice(first * block[0], (first + step) * block[0])]
    )
    return out
