"""The figures of one weight: its norm, its block scales, its codes, and what new scales would change; in float64.

An FP8 weight counts as `code * scale`, exactly. All that is told of a block of codes follows from how often each code
is in it, so that the codes are looked at once and the arithmetic is done on 256 numbers a block.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from minimax_jax.dtypes import DTYPES
from minimax_jax.jobs.difference import inner

Array: TypeAlias = npt.NDArray[Any]
Floats: TypeAlias = npt.NDArray[np.float64]

CODES = 256
CODE_VALUES: Floats = np.arange(CODES, dtype=np.uint8).view(DTYPES["F8_E4M3"]).astype(np.float64)
"""What each FP8 code stands for; NaN for two of them."""

LARGEST_CODES, ZERO_CODES = (0x7E, 0xFE), (0x00, 0x80)
"""The codes of +-448, where values saturate, and of +-0."""

OUTLIER_RATIO = 8.0
"""A block is an outlier when its largest magnitude is more than this many times the median block's of its matrix."""

_OUTLIERS_KEPT = 4
"""Of each matrix, the largest."""

_FINITE_VALUES = np.nan_to_num(CODE_VALUES, nan=0.0)
_AT_ONCE = 2**17
"""Elements: float64 copies of so many stay in the cache of a core."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Blocks:
    """What was measured of each block of a matrix; every array is float64 `[block rows, block cols]`.

    Attributes:
        squares: sum of squares of its finite values.
        amax: largest finite magnitude.
        scales: magnitude of the scale: the stored one, or the one by amax (`amax / 448`) where none is stored.
        errors: sum of squares of what quantising the block by amax changes; NaN where that cannot be done.
    """

    squares: Floats
    amax: Floats
    scales: Floats
    errors: Floats


@dataclass(frozen=True, kw_only=True, slots=True)
class Outlier:
    """A block that stands out of its matrix.

    Attributes:
        block: row and column in the grid of blocks.
        amax: its largest magnitude.
        ratio: that over the median of the blocks of the matrix that are not all zeros.
    """

    block: tuple[int, int]
    amax: float
    ratio: float


def code_histograms(codes: Array, block: tuple[int, int]) -> npt.NDArray[np.int64]:
    """How often each code is in each block: int64 `[block rows, block cols, 256]` of FP8 codes `[rows, cols]`."""
    bits = codes.view(np.uint8)
    starts = [range(0, size, step) for size, step in zip(codes.shape, block, strict=True)]
    counts = np.empty((len(starts[0]), len(starts[1]), CODES), np.int64)
    for i, row in enumerate(starts[0]):
        for j, col in enumerate(starts[1]):
            part = bits[row : row + block[0], col : col + block[1]]
            counts[i, j] = np.bincount(part.reshape(-1), minlength=CODES)
    return counts


def code_blocks(histograms: npt.NDArray[np.int64], scale_inv: Array) -> Blocks:
    """The blocks of an FP8 matrix.

    Args:
        histograms: of its codes, as from `code_histograms`.
        scale_inv: float32 `[block rows, block cols]`. Blocks whose scale is NaN or infinite count as zeros.
    """
    grid = scale_inv.shape
    counts = histograms.reshape(-1, CODES).astype(np.float64)
    scales = np.abs(scale_inv.reshape(-1).astype(np.float64))
    scales[~np.isfinite(scales)] = 0.0
    amax = np.where(counts > 0, np.abs(_FINITE_VALUES), 0.0).max(-1) * scales
    squares = np.einsum("bc,c->b", counts, _FINITE_VALUES**2) * scales**2
    found = Blocks(squares=squares, amax=amax, scales=scales, errors=_code_errors(counts, scales))
    return Blocks(**{name: getattr(found, name).reshape(grid) for name in Blocks.__slots__})


def float_blocks(weight: Array, block: tuple[int, int]) -> Blocks:
    """The blocks of a float matrix `[rows, cols]`; NaN and infinity count as zeros."""
    from minimax_jax.ops.fp8 import FP8_MAX, quantize  # with jax

    with np.errstate(invalid="ignore"):  # a signalling NaN
        weight = np.where(np.isfinite(weight), weight, weight.dtype.type(0))
    codes, derived = (np.asarray(part) for part in quantize(weight, block=block))
    bands = [slice(start, start + block[0]) for start in range(0, len(weight), block[0])]
    starts = np.arange(0, weight.shape[1], block[1])
    squares, amax, errors = (np.empty((len(bands), len(starts))) for _ in range(3))
    for i, band in enumerate(bands):
        wide = weight[band].astype(np.float64)
        scales = np.repeat(derived[i].astype(np.float64), block[1])[: weight.shape[1]]
        restored = CODE_VALUES[codes[band].view(np.uint8)] * scales
        squares[i] = np.add.reduceat(np.square(wide).sum(0), starts)
        errors[i] = np.add.reduceat(np.square(restored - wide).sum(0), starts)
        amax[i] = np.maximum.reduceat(np.abs(wide).max(0), starts)
    return Blocks(squares=squares, amax=amax, scales=amax / FP8_MAX, errors=errors)


def spread(blocks: Blocks) -> float:
    """Binary logarithm of the largest block scale over the smallest, of the blocks that are not all zeros; else NaN."""
    scales = blocks.scales[blocks.amax > 0]
    return float(np.log2(scales.max() / scales.min())) if scales.size else float("nan")


def outliers(blocks: Blocks) -> Iterator[Outlier]:
    """The blocks that stand out most, the largest first."""
    held = blocks.amax[blocks.amax > 0]
    if not held.size:
        return
    ratios = blocks.amax / np.median(held)
    for flat in np.argsort(-ratios, axis=None, kind="stable")[:_OUTLIERS_KEPT]:
        row, col = np.unravel_index(flat, ratios.shape)
        if ratios[row, col] > OUTLIER_RATIO:
            place = (int(row), int(col))
            yield Outlier(block=place, amax=float(blocks.amax[place]), ratio=float(ratios[place]))


def float_figures(tensor: Array) -> tuple[float, float]:
    """Sum of squares and largest magnitude of the finite values of floats of any shape."""
    squares = amax = 0.0
    flat = tensor.reshape(-1)
    for start in range(0, flat.size, _AT_ONCE):
        with np.errstate(invalid="ignore"):  # a signalling NaN
            wide = flat[start : start + _AT_ONCE].astype(np.float64)
        wide = wide[np.isfinite(wide)]
        squares += inner(wide, wide)
        amax = max(amax, float(np.abs(wide).max(initial=0.0)))
    return squares, amax


def _code_errors(counts: Floats, scales: Floats) -> Floats:
    """For each block, the squared change if its float32 weights were quantised by amax.

    Quantised are the 256 values that the codes stand for, those that do not occur as zeros: a block of their own.
    """
    from minimax_jax.ops.fp8 import quantize  # with jax

    values = np.where(counts > 0, _FINITE_VALUES, 0.0) * scales[:, None]
    with np.errstate(over="ignore"):
        weights = values.astype(np.float32)
    able = np.asarray(np.isfinite(weights).all(-1))
    codes, derived = quantize(np.where(able[:, None], weights, np.float32(0)), block=(1, CODES))
    restored = np.asarray(codes).astype(np.float64) * np.asarray(derived).astype(np.float64)
    return np.where(able, (counts * np.square(restored - values)).sum(-1), np.nan)
