"""CPU kernels, compiled by numba: what `minimax_jax.ops.host` runs. The same bits as the jax formulas beside them.

All in one pass over memory: lines of the cache are transposed in registers, decoded there, and written past the
cache, which they would only fill. Weights go by their bits, in the integers that `minimax_jax.ops.host` views them as;
codes as uint8. Scales must be ordinary (see `host.ordinary`), so that no result depends on how a processor treats
denormals, infinities, or NaN other than those of codes.

Numba keeps what it compiled beside this file, or where NUMBA_CACHE_DIR says, and looks at this file alone to tell
whether that is out of date: for a change of the modules beside it, there is PIECES.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import numba
import numpy as np

from minimax_jax.ops import kernels_simd as simd
from minimax_jax.ops.kernels_bits import (
    bits_of,
    float_of,
    float_of_code,
    has_table,
    is_bfloat16,
    rounded,
    size_of,
    widened,
)
from minimax_jax.ops.kernels_encode import differ, encode_group, peak
from minimax_jax.ops.kernels_lanes import LINE_BYTES

F = TypeVar("F", bound=Callable[..., Any])
Array = np.ndarray[Any, Any]

PIECES = "14bffa428f2ec4a66235b045fba62a65bfa57c3a2ca85c475bf27ba2e0f5485c"
"""SHA-256 of what kernels_bits.py, kernels_encode.py, kernels_lanes.py and kernels_simd.py hold, in this order."""

_TILE_ROWS = 256
"""Rows that are transposed at a time: few enough for the cache, and long runs to write."""

U8, U16, U32, F32 = np.uint8, np.uint16, np.uint32, np.float32


def kernel(function: F) -> F:
    """Compile; other threads run meanwhile. Without a folder that can be written to, each process compiles anew."""
    options = {"nogil": True, "error_model": "numpy"}
    try:
        return cast(F, numba.njit(cache=True, **options)(function))
    except RuntimeError:  # numba's word for: no place for a cache
        return cast(F, numba.njit(**options)(function))


@kernel
def transpose(sources: tuple[Array, ...], target: Array) -> None:
    """Matrices `[rows, cols]` of any type, side by side and transposed: `target [cols, parts*rows]`."""
    rows = sources[0].shape[0]
    for part in range(len(sources)):
        _transpose_tile(sources[part], target[:, part * rows : (part + 1) * rows])
    simd.fence()


@kernel
def decode_transposed(
    sources: tuple[Array, ...], scales: tuple[Array, ...], block: tuple[int, int], target: Array
) -> None:
    """Codes `[rows, cols]` and their scales to weights, side by side and transposed: `target [cols, parts*rows]`."""
    rows, cols = sources[0].shape
    high, wide = max(1, _TILE_ROWS // block[0]) * block[0], block[1]
    spread, table = np.empty(min(high, rows), np.float32), np.empty(256, np.uint8)
    for part in range(len(sources)):
        for row in range(0, rows, high):
            last, start = min(row + high, rows), part * rows
            for col in range(0, cols, wide):
                grid = scales[part][row // block[0] : -(-last // block[0]), col // wide]
                tile = target[col : col + wide, start + row : start + last]
                _decode_tile(sources[part][row:last, col : col + wide], grid, block[0], spread, table, tile)
    simd.fence()


@kernel
def decode(source: Array, scales: Array, block: tuple[int, int], parts: int, target: Array) -> None:
    """Codes `[rows, parts*cols]` and their scales to weights `target [rows, parts*cols]`."""
    cols, grid_cols = source.shape[1] // parts, scales.shape[1] // parts
    spread = np.empty(source.shape[1], np.float32)
    for index in range(scales.shape[0]):
        for part in range(parts):
            grid_row = scales[index, part * grid_cols : (part + 1) * grid_cols]
            _spread(grid_row, block[1], spread[part * cols : (part + 1) * cols])
        rows = slice(index * block[0], min((index + 1) * block[0], source.shape[0]))
        _decode_rows(source[rows], spread, target[rows])
    simd.fence()


DONE, CHANGED, NOT_COVERED = 0, 1, 2


@kernel
def encode(
    source: Array,
    start: int,
    cols: int,
    block: tuple[int, int],
    scales: Array,
    given: bool,
    target: Array,
    transposed: bool,
) -> int:
    """Weights to codes, of the columns `start` to `start + cols` of `source [rows, ...]`.

    Args:
        source: weights.
        start: the first column of the matrix.
        cols: how many columns it has.
        block: rows and columns of one block.
        scales: `[grid rows, grid cols]`; ordinary and positive where given, else they are written.
        given: whether to encode with these scales, as long as they reproduce the weights in all bits.
        target: the codes: `[cols, rows]` where transposed, else in the columns and rows of `source`.
        transposed: see `target`.

    Returns:
        DONE; CHANGED if given scales do not reproduce the weights; NOT_COVERED if weights are not finite or so small
        that scales are not ordinary. `target` is not whole unless DONE.
    """
    rows = source.shape[0]
    panel = np.empty((min(block[0], rows), min(block[1], cols)), np.uint8)
    room = np.empty(17, np.uint16), np.empty(max(17, panel.shape[1]), np.float32), np.empty(17, np.uint8)
    for index in range(scales.shape[0]):
        first, last = index * block[0], min((index + 1) * block[0], rows)
        for grid_col in range(scales.shape[1]):
            begin, stop = grid_col * block[1], min((grid_col + 1) * block[1], cols)
            place = slice(start + begin, start + stop)
            weights = source[first:last, place]
            if not given:
                scales[index, grid_col] = _scale(weights)
            scale = scales[index, grid_col]
            if not scale > F32(0):
                return NOT_COVERED
            codes = panel[: last - first, : stop - begin] if transposed else target[first:last, place]
            down, on = (0, block[1]) if stop < cols else (block[0], -begin)
            _encode_block(weights, scale, room, codes, down * source.strides[0] + on * source.itemsize)
            if given and not _reproduces(codes, scale, weights):
                return CHANGED
            if transposed:
                _transpose_tile(codes, target[begin:stop, first:last])
    simd.fence()
    return DONE


@kernel
def _transpose_tile(source: Array, target: Array) -> None:
    """`target[col, row] = source[row, col]`."""
    rows, cols = source.shape
    high, wide = LINE_BYTES // source.itemsize, simd.SQUARE_BYTES // source.itemsize
    whole_rows, whole_cols, even = rows - rows % high, cols - cols % wide, _even(target)
    for line in range(0, whole_cols, high):
        for row in range(0, whole_rows, high):
            for col in range(line, min(line + high, whole_cols), wide):
                simd.turn(source, row, col, target, even)
    for row in range(rows):
        for col in range(whole_cols if row < whole_rows else 0, cols):
            target[col, row] = source[row, col]


@kernel
def _even(target: Array) -> bool:
    """Whether every row begins with a line of the cache."""
    return bool((simd.address(target, 0) | simd.address(target, 1)) % LINE_BYTES == 0)


@kernel
def _spread(scales: Array, block: int, target: Array) -> None:
    """256 times each scale, `block` times, as far as `target` goes."""
    for index in range(scales.size):
        target[index * block : min((index + 1) * block, target.size)] = scales[index] * F32(256)


@kernel
def _decode_rows(codes: Array, spread: Array, target: Array) -> None:
    """Weights of rows of codes; `spread` has 256 times the scale of each column."""
    rows, cols = codes.shape
    whole, even = cols - cols % simd.GROUP, _even(target)
    for row in range(rows):
        for col in range(0, whole, simd.GROUP):
            simd.decode_group(codes, spread, target, row, col, even)
        for col in range(whole, cols):
            target[row, col] = rounded(float_of_code(codes[row, col]) * spread[col], target)


@kernel
def _decode_tile(codes: Array, scales: Array, block: int, spread: Array, table: Array, target: Array) -> None:
    """`target[col, row]`: the weight of `codes[row, col]`, whose scale is `scales[row // block]`."""
    rows, cols = codes.shape
    whole_rows, whole_cols, even = rows - rows % simd.GROUP, cols - cols % simd.SQUARE_BYTES, _even(target)
    by_table = has_table(target) and block % simd.GROUP == 0
    _spread(scales, block, spread[:rows])
    for row in range(0, whole_rows, simd.GROUP):
        if by_table and row % block == 0:
            _fill_table(spread[row], target, table)
        for col in range(0, whole_cols, simd.SQUARE_BYTES):
            if by_table:
                simd.look_up_turned(codes, row, col, table, target, even)
            else:
                simd.decode_turned(codes, row, col, spread, target, even)
    for row in range(rows):
        for col in range(whole_cols if row < whole_rows else 0, cols):
            target[col, row] = rounded(float_of_code(codes[row, col]) * spread[row], target)


@kernel
def _fill_table(scale: Any, like: Array, table: Array) -> None:
    """Weights of the codes 0 to 127: their lower bytes, then their upper ones; `scale` is 256 times what it is."""
    for code in range(128):
        bits = rounded(float_of_code(code) * scale, like)
        table[code], table[128 + code] = U8(bits & 0xFF), U8((bits >> 8) & 0xFF)


@kernel
def _scale(weights: Array) -> Any:
    """The scale of one block by amax; NaN where it is not ordinary."""
    amax = _amax(weights)
    scale = widened(amax) / F32(448)
    if amax == 0:
        return F32(1)
    return scale if F32(2.0**-110) <= scale <= F32(2.0**110) else F32(np.nan)


@kernel
def _amax(weights: Array) -> Any:
    """The bits of the largest magnitude; NaN is above all."""
    whole = weights.shape[1] // simd.GROUP * simd.GROUP
    amax = weights.dtype.type(0)
    for col in range(0, whole, simd.GROUP):
        amax = max(amax, peak(weights, col, weights.shape[0]))
    for row in range(weights.shape[0]):
        for col in range(whole, weights.shape[1]):
            amax = max(amax, size_of(weights[row, col], weights))
    return amax


@kernel
def _encode_block(weights: Array, scale: Any, room: tuple[Array, Array, Array], codes: Array, ahead: int) -> None:
    """Codes of a block; see `_encode_row`. The next block, `ahead` bytes from it, is brought to the cache."""
    limits, spread, few = room
    whole = weights.shape[1] // simd.GROUP * simd.GROUP if is_bfloat16(weights) and scale < F32(2.0**100) else 0
    spread[:] = scale
    if whole:
        _find_limits(limits, spread, few)
    for col in range(0, whole, simd.GROUP):
        encode_group(weights, col, limits, codes, ahead)
    if whole < weights.shape[1]:
        for row in range(weights.shape[0]):
            _encode_row(weights[row, whole:], spread, codes[row, whole:])


@kernel
def _find_limits(limits: Array, spread: Array, codes: Array) -> None:
    """`limits[k]`: bits of the smallest bfloat16 whose code is `k` or more, for 1 to 16, by `_encode_row` itself.

    Halfway between two codes, codes change. A little below that is a weight that has the lower code yet; of the next
    two, one is the first that has the upper code.
    """
    for code in range(17):
        halfway = (F32(code) - F32(0.5)) * F32(2.0**-9) * spread[code]
        limits[code] = U16(U32(bits_of(halfway * F32(1 - 2.0**-20)) >> U32(16)) + U32(1))
    _encode_row(limits, spread, codes)
    for code in range(17):
        limits[code] += U16(codes[code] < code)


@kernel
def _encode_row(weights: Array, spread: Array, codes: Array) -> None:
    """Codes of `weights / spread`, rounded to nearest even; of what is beyond 448, or NaN, whatever.

    Codes are eight to a power of two, and 2**-9 apart below 2**-6: a quotient is rounded to that by adding 2**20 times
    its power of two, whose float32 are just as far apart.
    """
    for i in range(weights.size):
        bits = bits_of(widened(weights[i]))
        size = float_of(U32(bits & U32(0x7FFFFFFF))) / spread[i]
        power = U32(bits_of(size) & U32(0x7F800000))
        power = power if power > U32(0x3C800000) else U32(0x3C800000)  # 2**-6
        steps = bits_of(size + float_of(U32(power + U32(20 << 23))))
        code = U32(steps + U32(power >> U32(20))) + U32(0x400 - 0x3C8)
        codes[i] = U8(U32(code & U32(0x7F)) | U32((bits >> U32(24)) & U32(0x80)))


@kernel
def _reproduces(codes: Array, scale: Any, weights: Array) -> bool:
    """Whether the codes give back all bits of the weights, and these are finite: of others, codes are whatever."""
    whole, different = weights.shape[1] // simd.GROUP * simd.GROUP, U32(0)
    for col in range(0, whole, simd.GROUP):
        if differ(codes, scale * F32(256), weights, col):
            return False
    for row in range(codes.shape[0]):
        for col in range(whole, codes.shape[1]):
            back = rounded(float_of_code(codes[row, col]) * (scale * F32(256)), weights)
            different = U32(different | U32(back ^ weights[row, col]))
    return not different and widened(_amax(weights)) < F32(np.inf)
