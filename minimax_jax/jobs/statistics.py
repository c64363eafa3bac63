"""What the numbers of a tensor are like: range, mean, zeros, NaN, and for FP8 its codes and block scales."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from minimax_jax.dtypes import NAMES
from minimax_jax.jobs.compare import Array, Weight

_MAGNITUDE, _ZERO, _SATURATED, _NAN = 0x7F, 0, 0x7E, 0x7F
"""Codes of float8_e4m3fn without their sign: 0x7E is 448, the largest number, and 0x7F is NaN (OCP 8-bit formats)."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Statistics:
    """The numbers of a tensor, FP8 dequantised.

    Attributes:
        elements: how many there are.
        minimum: the least that is not NaN; infinity where there is none.
        maximum: the largest that is not NaN; minus infinity where there is none.
        finite: how many are finite.
        total: the sum of these, in float64.
        zeros: how many are zero; of FP8, how many codes are.
        nans: how many are NaN; of FP8, how many codes are.
        saturated: how many FP8 codes are 448 or -448; None for other dtypes.
        block_amax: largest magnitude in each block of a matrix, float32 [blocks]; NaN left out. Empty for vectors.
        scale_inv: least and largest block scale of FP8; None for other dtypes.
    """

    elements: int
    minimum: float
    maximum: float
    finite: int
    total: float
    zeros: int
    nans: int
    saturated: int | None
    block_amax: npt.NDArray[np.float32]
    scale_inv: tuple[float, float] | None

    @property
    def mean(self) -> float:
        """Mean of what is finite; 0 where nothing is."""
        return self.total / self.finite if self.finite else 0.0

    @property
    def amax(self) -> float:
        """The largest magnitude that is not NaN; 0 where there is none."""
        return max(self.maximum, -self.minimum, 0.0)

    def __add__(self, other: Statistics) -> Statistics:
        """Of both parts together; of one dtype."""
        sums = {name: getattr(self, name) + getattr(other, name) for name in ("elements", "finite", "total", "zeros")}
        ranges = [own for own in (self.scale_inv, other.scale_inv) if own is not None]
        saturated = (self.saturated or 0) + (other.saturated or 0)
        return Statistics(
            **sums,
            nans=self.nans + other.nans,
            minimum=min(self.minimum, other.minimum),
            maximum=max(self.maximum, other.maximum),
            saturated=None if self.saturated is None else saturated,
            block_amax=np.concatenate([self.block_amax, other.block_amax]),
            scale_inv=(min(low for low, _ in ranges), max(high for _, high in ranges)) if ranges else None,
        )


def statistics(weight: Weight) -> Statistics:
    """The statistics of a weight; `weight.block` says how large the blocks of a matrix are, of any dtype."""
    floats = weight.floats("F32")
    quantised = NAMES[weight.values.dtype] == "F8_E4M3"
    magnitudes = np.abs(floats)
    finite = np.isfinite(floats)
    codes = weight.values.view(np.uint8) & _MAGNITUDE if quantised else None
    return Statistics(
        elements=floats.size,
        minimum=float(np.fmin.reduce(floats, axis=None, initial=np.inf)),
        maximum=float(np.fmax.reduce(floats, axis=None, initial=-np.inf)),
        finite=int(np.count_nonzero(finite)),
        total=float(np.sum(floats, dtype=np.float64, where=finite)),
        zeros=int(np.count_nonzero((floats if codes is None else codes) == _ZERO)),
        nans=int(np.count_nonzero(np.isnan(floats) if codes is None else codes == _NAN)),
        saturated=None if codes is None else int(np.count_nonzero(codes == _SATURATED)),
        block_amax=_block_amax(magnitudes, weight.block),
        scale_inv=None if weight.scales is None else (float(np.min(weight.scales)), float(np.max(weight.scales))),
    )


def merged(parts: Iterable[Statistics]) -> Statistics:
    """The statistics of a whole from those of its parts."""
    return functools.reduce(Statistics.__add__, parts)


def _block_amax(magnitudes: Array, block: tuple[int, int]) -> npt.NDArray[np.float32]:
    """The largest magnitude in each block of a matrix `[rows, cols]`, row by row of blocks."""
    if magnitudes.ndim != 2:
        return np.zeros(0, np.float32)
    by_rows = np.fmax.reduceat(magnitudes, range(0, magnitudes.shape[0], block[0]), axis=0)
    by_block = np.fmax.reduceat(by_rows, range(0, magnitudes.shape[1], block[1]), axis=1)
    return np.nan_to_num(by_block.reshape(-1), nan=0.0, posinf=np.inf)
