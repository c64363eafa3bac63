"""CPU kernels, compiled by numba: what `minimax_jax.ops.host` runs. The same bits as the jax formulas beside them.

All in one pass over memory: squares of bytes are transposed in registers, and a strip of them is decoded while it is
in the cache. Weights go by their bits, in the integers that `minimax_jax.ops.host` views them as: bfloat16 as uint16,
float16 as int16, float32 as uint32; codes as uint8. Scales must be ordinary (see `host.ordinary`), so that no result
depends on how a processor treats denormals, infinities, or NaN other than those of codes.

Numba keeps what it compiled beside this file, or where NUMBA_CACHE_DIR says, and looks at this file alone to tell
whether that is out of date: everything that is compiled stands here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import llvmlite.ir as ir
import numba
import numpy as np
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic, overload

F = TypeVar("F", bound=Callable[..., Any])
Array = np.ndarray[Any, Any]

_I64, _HALF, _FLOAT = ir.IntType(64), ir.HalfType(), ir.FloatType()
_VECTOR_BYTES = 16
_STRIP, _TILE_ROWS = 16, 1536
"""Columns and rows of a matrix that are transposed at a time: few enough for the cache, and long runs to write."""

_PANEL = 256
"""Columns of weights in work at once, or one block where that is more: read twice, a row of blocks high."""

_WIDE_STRIP = 64
"""Columns at a time where what is transposed is in the cache already, and few rows high."""

U8, U16, U32, F32 = np.uint8, np.uint16, np.uint32, np.float32


def kernel(function: F) -> F:
    """Compile; other threads run meanwhile. Without a folder that can be written to, each process compiles anew."""
    options = {"nogil": True, "error_model": "numpy"}
    try:
        return cast(F, numba.njit(cache=True, **options)(function))
    except RuntimeError:  # numba's word for: no place for a cache
        return cast(F, numba.njit(**options)(function))


# --- kernels ---------------------------------------------------------------------------------------------------------


@kernel
def transpose(sources: tuple[Array, ...], target: Array) -> None:
    """Matrices `[rows, cols]` of any type, side by side and transposed: `target [cols, parts*rows]`."""
    rows = sources[0].shape[0]
    for part in range(len(sources)):
        for row in range(0, rows, _TILE_ROWS):
            high = min(_TILE_ROWS, rows - row)
            start = part * rows + row
            _transpose_tile(sources[part][row : row + high], target[:, start : start + high], _STRIP)


@kernel
def decode_transposed(
    sources: tuple[Array, ...], scales: tuple[Array, ...], block: tuple[int, int], target: Array
) -> None:
    """Codes `[rows, cols]` and their scales to weights, side by side and transposed: `target [cols, parts*rows]`."""
    rows, cols = sources[0].shape
    strip = np.empty((min(_STRIP, cols), min(_TILE_ROWS, rows)), np.uint8)
    spread = np.empty(rows, np.float32)
    for part in range(len(sources)):
        for block_col in range(scales[part].shape[1]):
            _spread(scales[part][:, block_col], block[0], spread, F32(256))
            stop = min((block_col + 1) * block[1], cols)
            for first in range(block_col * block[1], stop, _STRIP):
                wide = min(_STRIP, stop - first)
                for row in range(0, rows, _TILE_ROWS):
                    high = min(_TILE_ROWS, rows - row)
                    _transpose_strip(sources[part][row : row + high], first, wide, strip[:wide, :high])
                    for col in range(wide):
                        start = part * rows + row
                        weights = target[first + col, start : start + high]
                        _decode_row(strip[col, :high], spread[row : row + high], weights)


@kernel
def decode(source: Array, scales: Array, block: tuple[int, int], parts: int, target: Array) -> None:
    """Codes `[rows, parts*cols]` and their scales to weights `target [rows, parts*cols]`."""
    rows, cols = source.shape[0], source.shape[1] // parts
    grid_cols = scales.shape[1] // parts
    spread = np.empty(source.shape[1], np.float32)
    for row in range(rows):
        if row % block[0] == 0:
            for part in range(parts):
                grid_row = scales[row // block[0], part * grid_cols : (part + 1) * grid_cols]
                _spread(grid_row, block[1], spread[part * cols : (part + 1) * cols], F32(256))
        _decode_row(source[row], spread, target[row])


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
    rows, step = source.shape[0], max(1, _PANEL // block[1]) * block[1]
    panel = np.empty((min(block[0], rows), min(step, cols)), np.uint8)
    spread = np.empty(min(step, cols), np.float32)
    for index in range(scales.shape[0]):
        first = index * block[0]
        high = min(block[0], rows - first)
        for col in range(0, cols, step):
            wide, begin = min(step, cols - col), start + col
            grid = scales[index, col // block[1] : -(-(col + wide) // block[1])]
            if not given and not _scale_panel(source, first, high, begin, wide, block[1], grid):
                return NOT_COVERED
            _spread(grid, block[1], spread[:wide], F32(1))
            for row in range(high):
                weights = source[first + row, begin : begin + wide]
                codes = panel[row, :wide] if transposed else target[first + row, begin : begin + wide]
                _encode_row(weights, spread, codes)
                if given and not _reproduces(codes, spread, weights):
                    return CHANGED
            if transposed:
                _transpose_tile(panel[:high, :wide], target[col : col + wide, first : first + high], _WIDE_STRIP)
    return DONE


# --- pieces ----------------------------------------------------------------------------------------------------------


@kernel
def _transpose_tile(source: Array, target: Array, strip: int) -> None:
    """`target[col, row] = source[row, col]`, a strip of columns after the other, so that whole lines are written."""
    for col in range(0, source.shape[1], strip):
        wide = min(strip, source.shape[1] - col)
        _transpose_strip(source, col, wide, target[col : col + wide])


@kernel
def _transpose_strip(source: Array, first: int, wide: int, target: Array) -> None:
    """`target[col, row] = source[row, first + col]` for `wide` columns."""
    rows = source.shape[0]
    side = _VECTOR_BYTES // source.itemsize
    whole_rows, whole_cols = rows - rows % side, wide - wide % side
    for row in range(0, whole_rows, side):
        for col in range(0, whole_cols, side):
            _transpose_square(source, row, first + col, target, col, row)
        for col in range(whole_cols, wide):
            for r in range(row, row + side):
                target[col, r] = source[r, first + col]
    for row in range(whole_rows, rows):
        for col in range(wide):
            target[col, row] = source[row, first + col]


@kernel
def _spread(scales: Array, block: int, target: Array, factor: Any) -> None:
    """Each scale times `factor`, `block` times, as far as `target` goes. Codes are decoded with a factor of 256."""
    for index in range(scales.size):
        for place in range(index * block, min((index + 1) * block, target.size)):
            target[place] = scales[index] * factor


@kernel
def _decode_row(codes: Array, spread: Array, target: Array) -> None:
    for i in range(codes.size):
        target[i] = _rounded(_float_of_code(codes[i]) * spread[i], target)


@kernel
def _float_of_code(code: Any) -> Any:
    """A code as float32, divided by 256: read as a float16, whose exponents begin 8 lower. NaN stays NaN."""
    half = U16((U16(np.int16(np.int8(code))) << U16(7)) & U16(0xBFFF))
    if U8(code) & U8(0x7F) == U8(0x7F):
        half = U16(half ^ U16(0x4180))  # 0x3F80, 1.875, to the quiet NaN 0x7E00
    return _float_of_half(half)


@kernel
def _scale_panel(source: Array, first: int, high: int, start: int, cols: int, block: int, scales: Array) -> bool:
    """Scales by amax for blocks side by side; False where one is not ordinary."""
    peaks = np.zeros(cols, source.dtype)
    for row in range(first, first + high):
        _raise_peaks(source[row, start : start + cols], peaks)
    for index in range(scales.size):
        amax = _widened(peaks[index * block : (index + 1) * block].max())
        scale = amax / F32(448)
        if not F32(2.0**-110) <= scale <= F32(2.0**110) and amax != F32(0):  # nor is NaN
            return False
        scales[index] = F32(1) if amax == F32(0) else scale
    return True


@kernel
def _raise_peaks(weights: Array, peaks: Array) -> None:
    """The larger magnitudes: without their sign, bits are ordered as the numbers are, NaN above all."""
    narrow = weights.dtype.type  # else numba widens to 64 bits
    mask = narrow((1 << (8 * weights.itemsize - 1)) - 1)
    for i in range(weights.size):
        size = narrow(weights[i] & mask)
        peaks[i] = size if size > peaks[i] else peaks[i]


@kernel
def _encode_row(weights: Array, spread: Array, codes: Array) -> None:
    """Codes of `weights / spread`, rounded to nearest even; of what is beyond 448, or NaN, whatever.

    Codes are eight to a power of two, and 2**-9 apart below 2**-6: a quotient is rounded to that by adding 2**20 times
    its power of two, whose float32 are just as far apart.
    """
    for i in range(weights.size):
        bits = _bits_of(_widened(weights[i]))
        size = _float_of(U32(bits & U32(0x7FFFFFFF))) / spread[i]
        power = U32(_bits_of(size) & U32(0x7F800000))
        power = power if power > U32(0x3C800000) else U32(0x3C800000)  # 2**-6
        steps = _bits_of(size + _float_of(U32(power + U32(20 << 23))))
        code = U32(steps + U32(power >> U32(20))) + U32(0x400 - 0x3C8)
        codes[i] = U8(U32(code & U32(0x7F)) | U32((bits >> U32(24)) & U32(0x80)))


@kernel
def _reproduces(codes: Array, spread: Array, weights: Array) -> bool:
    different = U32(0)
    for i in range(codes.size):
        back = _rounded(_float_of_code(codes[i]) * (spread[i] * F32(256)), weights)
        different = U32(different | U32(back ^ weights[i]))
    return not different


def _rounded(x: Any, like: Any) -> Any:
    """`x`, float32, rounded to nearest even to what the elements of `like` are the bits of."""
    raise NotImplementedError


@overload(_rounded)  # type: ignore[untyped-decorator]
def _rounded_overload(x: Any, like: Any) -> Any:
    def bfloat16(x: Any, like: Any) -> Any:
        bits = _bits_of(x)  # of a NaN, those of `_float_of_code`: the sum leaves its upper half alone
        return U16(U32(bits + U32(0x7FFF) + ((bits >> U32(16)) & U32(1))) >> U32(16))

    def float16(x: Any, like: Any) -> Any:
        return np.int16(_half_of_float(x))

    def float32(x: Any, like: Any) -> Any:
        return _bits_of(x)

    return {types.uint16: bfloat16, types.int16: float16, types.uint32: float32}[like.dtype]


def _widened(bits: Any) -> Any:
    """The weight of these bits as float32; the inverse of `_rounded`."""
    raise NotImplementedError


@overload(_widened)  # type: ignore[untyped-decorator]
def _widened_overload(bits: Any) -> Any:
    def bfloat16(bits: Any) -> Any:
        return _float_of(U32(U32(bits) << U32(16)))

    def float16(bits: Any) -> Any:
        return _float_of_half(U16(bits))

    def float32(bits: Any) -> Any:
        return _float_of(bits)

    return {types.uint16: bfloat16, types.int16: float16, types.uint32: float32}[bits]


# --- instructions that numba has no name for -------------------------------------------------------------------------


@intrinsic  # type: ignore[untyped-decorator]
def _bits_of(_: Any, x: Any) -> Any:
    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], ir.IntType(32))

    return types.uint32(types.float32), emit


@intrinsic  # type: ignore[untyped-decorator]
def _float_of(_: Any, bits: Any) -> Any:
    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], _FLOAT)

    return types.float32(types.uint32), emit


@intrinsic  # type: ignore[untyped-decorator]
def _float_of_half(_: Any, half: Any) -> Any:
    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.fpext(builder.bitcast(args[0], _HALF), _FLOAT)

    return types.float32(types.uint16), emit


@intrinsic  # type: ignore[untyped-decorator]
def _half_of_float(_: Any, x: Any) -> Any:
    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(builder.fptrunc(args[0], _HALF), ir.IntType(16))

    return types.uint16(types.float32), emit


@intrinsic  # type: ignore[untyped-decorator]
def _transpose_square(_: Any, source: Any, row: Any, col: Any, target: Any, to_row: Any, to_col: Any) -> Any:
    """Transpose a square of 16 bytes a side, from `source[row, col]` on to `target[to_row, to_col]`, in registers.

    Interleaving the first half of the rows with the second half, as often as the side has bits, is a transposition.
    """
    itemsize = source.dtype.bitwidth // 8
    side = _VECTOR_BYTES // itemsize
    vector = ir.VectorType(ir.IntType(8 * itemsize), side)
    halves = [
        ir.Constant(
            ir.VectorType(ir.IntType(32), side), [side * (lane % 2) + start + lane // 2 for lane in range(side)]
        )
        for start in (0, side // 2)
    ]

    def rows_at(context: Any, builder: Any, kind: Any, array: Any, row: Any, col: Any) -> list[Any]:
        fields = context.make_array(kind)(context, builder, array)
        stride, _ = cgutils.unpack_tuple(builder, fields.strides, 2)
        start = builder.add(builder.ptrtoint(fields.data, _I64), builder.mul(col, _I64(itemsize)))
        places = [builder.mul(stride, builder.add(row, _I64(lane))) for lane in range(side)]
        return [builder.inttoptr(builder.add(start, place), vector.as_pointer()) for place in places]

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        rows = [builder.load(p, align=1) for p in rows_at(context, builder, source, *args[:3])]
        for _ in range(side.bit_length() - 1):
            pairs = zip(rows[: side // 2], rows[side // 2 :], strict=True)
            rows = [builder.shuffle_vector(*pair, half) for pair in pairs for half in halves]
        for row, place in zip(rows, rows_at(context, builder, target, *args[3:]), strict=True):
            builder.store(row, place, align=1)
        return context.get_dummy_value()

    return types.void(source, types.intp, types.intp, target, types.intp, types.intp), emit
