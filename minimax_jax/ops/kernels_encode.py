"""What makes codes of blocks of weights, in LLVM's terms; see `minimax_jax.ops.kernels_simd`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import llvmlite.ir as ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from minimax_jax.ops.kernels_lanes import I8, I16, I64, LINE_BYTES, Lanes, fetch, place_of
from minimax_jax.ops.kernels_simd import GROUP, TABLES, decoded

_AHEAD = 256
"""Columns of weights by which the encoder has memory brought to the cache."""


@intrinsic  # type: ignore[untyped-decorator]
def peak(_: Any, weights: Any, col: Any, rows: Any) -> Any:
    """The largest bits without sign in `weights[:rows, col : col + GROUP]`, which is amax: NaN is above all."""
    bits = ir.IntType(weights.dtype.bitwidth)

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        array, col, rows = args
        lanes = Lanes(builder, GROUP)
        peaks = cgutils.alloca_once_value(builder, lanes.constant(bits, 0))
        with cgutils.for_range(builder, rows) as loop:
            place = place_of(context, builder, weights, array, loop.index, col)
            sizes = builder.and_(lanes.load(place, bits), lanes.constant(bits, (1 << (bits.width - 1)) - 1))
            larger = builder.icmp_unsigned(">", sizes, builder.load(peaks))
            builder.store(builder.select(larger, sizes, builder.load(peaks)), peaks)
        return lanes.reduced("umax", builder.load(peaks))

    return weights.dtype(weights, types.intp, types.intp), emit


@intrinsic  # type: ignore[untyped-decorator]
def encode_group(_: Any, weights: Any, col: Any, limits: Any, codes: Any) -> Any:
    """Codes of bfloat16 weights that have one scale: `codes[:, col : col + GROUP]`.

    From code 8 on, eight codes make a power of two, and the same bits after the exponent begin a code in each of them.
    The few smaller weights are held against the limits of their codes.

    Args:
        weights: bits, `[rows, cols]`.
        col: the first column.
        limits: bits of the smallest weight that has code `k` or a larger one, at place `k`, uint16 `[17]`.
        codes: `[rows, cols]`.
    """

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        lanes = Lanes(builder, GROUP)
        limit = [
            builder.load(builder.inttoptr(place_of(context, builder, limits, args[2], I64(code)), I16.as_pointer()))
            for code in range(17)
        ]
        first = builder.sub(limit[16], I16(0x80))  # of the power of two of code 8, whose own limit is lower
        steps = [builder.trunc(builder.sub(limit[code], first), I8) for code in range(9, 16)]
        tables = [lanes.count_reached(lanes.numbers(I8, start), steps) for start in (0, GROUP)] if TABLES else []

        def count(low: Any) -> Any:
            return lanes.look_up(tables, low) if TABLES else lanes.count_reached(low, steps)

        rows = cgutils.unpack_tuple(builder, context.make_array(codes)(context, builder, args[3]).shape, 2)[0]
        with cgutils.for_range(builder, rows) as loop:
            bits = lanes.load(place_of(context, builder, weights, args[0], loop.index, args[1]), I16)
            code = _encode(lanes, bits, first, count, limit[1:9])
            place = place_of(context, builder, codes, args[3], loop.index, args[1])
            builder.store(code, builder.inttoptr(place, code.type.as_pointer()), align=1)
            ahead = place_of(context, builder, weights, args[0], loop.index, builder.add(args[1], I64(_AHEAD)))
            fetch(builder, ahead)
            fetch(builder, builder.add(ahead, I64(LINE_BYTES)))
        return context.get_dummy_value()

    return types.void(weights, types.intp, limits, codes), emit


def _encode(lanes: Lanes, bits: Any, first: Any, count: Callable[[Any], Any], small_limits: list[Any]) -> Any:
    build, narrow = lanes.builder, lanes.of(I8)
    size = build.and_(bits, lanes.constant(I16, 0x7FFF))
    above = build.sub(bits, lanes.same(first))  # with the sign where it was, unless the weight is small
    low = build.and_(build.trunc(above, narrow), lanes.constant(I8, 0x7F))
    eights = build.trunc(build.lshr(above, lanes.constant(I16, 4)), narrow)
    eights = build.add(build.and_(eights, lanes.constant(I8, 0x78)), lanes.constant(I8, 8))
    code = cgutils.alloca_once_value(build, build.add(eights, count(low)))
    small = build.icmp_unsigned("<", size, lanes.same(first))
    with build.if_then(build.icmp_unsigned("!=", build.bitcast(small, I64), I64(0)), likely=False):
        few = build.trunc(lanes.count_reached(size, small_limits), narrow)
        build.store(build.select(small, few, build.load(code)), code)
    sign = build.trunc(build.lshr(bits, lanes.constant(I16, 8)), narrow)
    return build.or_(build.load(code), build.and_(sign, lanes.constant(I8, 0x80)))


@intrinsic  # type: ignore[untyped-decorator]
def differ(_: Any, codes: Any, scale: Any, weights: Any, col: Any) -> Any:
    """Whether a code times its scale is not the weight, in any bit, in the columns `col` to `col + GROUP`.

    `scale` is 256 times that of all the codes.
    """
    bits = ir.IntType(weights.dtype.bitwidth)

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        lanes = Lanes(builder, GROUP)
        scale, found = lanes.same(args[1]), cgutils.alloca_once_value(builder, lanes.constant(bits, 0))
        rows = cgutils.unpack_tuple(builder, context.make_array(codes)(context, builder, args[0]).shape, 2)[0]
        with cgutils.for_range(builder, rows) as loop:
            code = lanes.load(place_of(context, builder, codes, args[0], loop.index, args[3]), I8)
            weight = lanes.load(place_of(context, builder, weights, args[2], loop.index, args[3]), bits)
            other = builder.xor(decoded(lanes, code, scale, weights.dtype), weight)
            builder.store(builder.or_(builder.load(found), other), found)
        return builder.icmp_unsigned("!=", lanes.reduced("or", builder.load(found)), bits(0))

    return types.boolean(codes, types.float32, weights, types.intp), emit
