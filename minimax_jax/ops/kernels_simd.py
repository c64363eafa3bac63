"""What the kernels do to many numbers at once, in LLVM's terms: for any processor, and in whole lines of its cache.

Arrays are seen as `minimax_jax.ops.kernels_numba` has them; of two axes, the last is without gaps. No bound is checked.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import llvmlite.ir as ir
import numba
from llvmlite.binding import llvm_version_info
from numba import types
from numba.core.codegen import get_host_cpu_features
from numba.extending import intrinsic

from minimax_jax.ops.kernels_lanes import (
    FLOAT,
    HALF,
    I8,
    I16,
    I32,
    I64,
    LINE_BYTES,
    BFloat,
    Lanes,
    align_stack,
    fetch,
    join,
    place_of,
    places_below,
    shuffle,
    store,
)

GROUP = 64
"""Weights at a time: their codes fill a line."""

SQUARE_BYTES = 16
"""Of the columns that are transposed at a time."""

_ASKED = numba.config.CPU_FEATURES
_FEATURES = get_host_cpu_features() if _ASKED is None else _ASKED  # without AVX where numba is told so
TABLES = "+avx512vbmi" in _FEATURES.split(",")
"""Whether the processor looks up 64 bytes at a time in a table of 128."""

_ROUNDS = "+avx512bf16" in _FEATURES.split(",") and llvm_version_info >= (20,)
"""Whether the processor rounds to bfloat16, and LLVM knows: others end the process, or call what is not there."""

_NAN = {types.uint16: 0x7FC0, types.int16: 0x7E00, types.uint32: 0x7FC00000}
"""NaN, by what the bits of weights are seen as."""


# --- lines -----------------------------------------------------------------------------------------------------------


@intrinsic  # type: ignore[untyped-decorator]
def address(_: Any, array: Any, row: Any) -> Any:
    """Where a row begins."""

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return place_of(context, builder, array, *args, I64(0))

    return types.intp(array, types.intp), emit


@intrinsic  # type: ignore[untyped-decorator]
def fence(_: Any) -> Any:
    """What went past the cache is there for other threads."""

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        builder.fence("seq_cst")
        return context.get_dummy_value()

    return types.void(), emit


# --- codes -----------------------------------------------------------------------------------------------------------


@intrinsic  # type: ignore[untyped-decorator]
def decode_group(_: Any, codes: Any, spread: Any, target: Any, row: Any, col: Any, even: Any) -> Any:
    """Weights of GROUP codes: `target[row, col : col + GROUP]`.

    Args:
        codes: `[rows, cols]`.
        spread: 256 times the scale of each column, float32 `[cols]`.
        target: bits of the weights, `[rows, cols]`.
        row: of codes and weights.
        col: of codes and weights.
        even: see `store`.
    """

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        lanes = Lanes(builder, GROUP)
        code = lanes.load(place_of(context, builder, codes, args[0], *args[3:5]), I8)
        scale = lanes.load(place_of(context, builder, spread, args[1], args[4]), FLOAT)
        weights = decoded(lanes, code, scale, target.dtype)
        store(builder, weights, place_of(context, builder, target, *args[2:5]), args[5])
        return context.get_dummy_value()

    return types.void(codes, spread, target, types.intp, types.intp, types.boolean), emit


@intrinsic  # type: ignore[untyped-decorator]
def decode_turned(_: Any, codes: Any, row: Any, col: Any, spread: Any, target: Any, even: Any) -> Any:
    """As `turn`, and decode on the way; `spread` has 256 times the scale of each row, float32 `[rows]`."""

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        lanes = Lanes(builder, GROUP)
        scale = lanes.load(place_of(context, builder, spread, args[3], args[1]), FLOAT)
        _turn(
            context, builder, signature, (*args[:3], *args[4:]), lambda code: decoded(lanes, code, scale, target.dtype)
        )
        return context.get_dummy_value()

    return types.void(codes, types.intp, types.intp, spread, target, types.boolean), emit


@intrinsic  # type: ignore[untyped-decorator]
def look_up_turned(_: Any, codes: Any, row: Any, col: Any, table: Any, target: Any, even: Any) -> Any:
    """As `turn`, and look up on the way; for weights of two bytes, where TABLES.

    `table` has the lower bytes of the weights of codes 0 to 127, then the upper ones, uint8 `[256]`.
    """

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        lanes = Lanes(builder, GROUP)
        tables = [lanes.load(place_of(context, builder, table, args[3], I64(at)), I8) for at in range(0, 256, GROUP)]
        _turn(context, builder, signature, (*args[:3], *args[4:]), lambda code: _look_up(lanes, code, tables))
        return context.get_dummy_value()

    def nothing(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return context.get_dummy_value()

    known = TABLES and target.dtype.bitwidth == 16
    return types.void(codes, types.intp, types.intp, table, target, types.boolean), emit if known else nothing


def _look_up(lanes: Lanes, code: Any, tables: list[Any]) -> Any:
    build, low, high = lanes.builder, lanes.look_up(tables[:2], code), lanes.look_up(tables[2:], code)
    high = build.xor(high, build.and_(code, lanes.constant(I8, 0x80)))
    pairs = shuffle(build, low, high, [place for lane in range(GROUP) for place in (lane, GROUP + lane)])
    return build.bitcast(pairs, lanes.of(I16))


def decoded(lanes: Lanes, code: Any, scale: Any, kind: Any) -> Any:
    """Bits of the weights of codes; `scale` is 256 times what it is, `kind` what the bits are seen as."""
    build, wide = lanes.builder, ir.IntType(kind.bitwidth)
    size = build.and_(code, lanes.constant(I8, 0x7F))  # read as a float16, whose exponents begin 8 lower
    half = build.shl(build.zext(size, lanes.of(I16)), lanes.constant(I16, 7))
    weight = build.fmul(build.fpext(build.bitcast(half, lanes.of(HALF)), lanes.of(FLOAT)), scale)
    is_nan = build.icmp_unsigned("==", size, lanes.constant(I8, 0x7F))
    bits = build.select(is_nan, lanes.constant(wide, _NAN[kind]), _round(lanes, weight, kind))
    return build.xor(bits, build.and_(build.sext(code, lanes.of(wide)), lanes.constant(wide, 1 << (wide.width - 1))))


def _round(lanes: Lanes, weight: Any, kind: Any) -> Any:
    """Bits of the nearest weights, ties to even."""
    build = lanes.builder
    if kind == types.uint16 and not _ROUNDS:
        bits = build.bitcast(weight, lanes.of(I32))
        odd = build.and_(build.lshr(bits, lanes.constant(I32, 16)), lanes.constant(I32, 1))
        bits = build.add(build.add(bits, lanes.constant(I32, 0x7FFF)), odd)
        return build.trunc(build.lshr(bits, lanes.constant(I32, 16)), lanes.of(I16))
    if kind != types.uint32:
        weight = build.fptrunc(weight, lanes.of(BFloat() if kind == types.uint16 else HALF))
    return build.bitcast(weight, lanes.of(ir.IntType(kind.bitwidth)))


# --- transposing -----------------------------------------------------------------------------------------------------


@intrinsic  # type: ignore[untyped-decorator]
def turn(_: Any, source: Any, row: Any, col: Any, target: Any, even: Any) -> Any:
    """Transpose rows that make up a line, SQUARE_BYTES wide: `target[col + j, row + i] = source[row + i, col + j]`.

    Args:
        source: `[rows, cols]`.
        row: the first row.
        col: the first column.
        target: `[cols, rows]`.
        even: see `store`.
    """

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        _turn(context, builder, signature, args, lambda line: line)
        return context.get_dummy_value()

    return types.void(source, types.intp, types.intp, target, types.boolean), emit


def _turn(context: Any, builder: Any, signature: Any, args: Any, change: Callable[[Any], Any]) -> None:
    """Rows come in squares, one below the other, and the same row of all squares is worked on at a time.

    Interleaving the first half of the rows with the second half, as often as the side has bits, is a transposition.
    What is needed after the next line is brought to the cache: a part of it each time, since several share that line.
    """
    align_stack(builder)
    kind, goal, (source, row, col, target, even) = signature.args[0], signature.args[-2], args
    item = ir.IntType(kind.dtype.bitwidth)
    side, squares = 8 * SQUARE_BYTES // item.width, LINE_BYTES // SQUARE_BYTES
    places = places_below(context, builder, kind, source, row, col, side * squares)
    mine = builder.and_(builder.udiv(col, I64(side)), I64(squares - 1))
    ahead = builder.add(col, I64(2 * side * squares))
    for place in places_below(
        context, builder, kind, source, builder.add(row, builder.mul(mine, I64(side))), ahead, side
    ):
        fetch(builder, place)
    lanes, whole = Lanes(builder, side), side * squares
    pieces = [lanes.load(place, item) for place in places]
    rows = [join(builder, pieces[lane::side]) for lane in range(side)]
    halves = [
        [square + lane + other for square in range(0, whole, side) for lane in half for other in (0, whole)]
        for half in (range(side // 2), range(side // 2, side))
    ]
    for _ in range(side.bit_length() - 1):
        pairs = zip(rows[: side // 2], rows[side // 2 :], strict=True)
        rows = [shuffle(builder, *pair, half) for pair in pairs for half in halves]
    for line, place in zip(rows, places_below(context, builder, goal, target, col, row, side), strict=True):
        store(builder, change(line), place, even)
