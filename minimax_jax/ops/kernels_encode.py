"""What makes codes of blocks of weights, in LLVM's terms; see `minimax_jax.ops.kernels_simd`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import llvmlite.ir as ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from minimax_jax.ops.kernels_lanes import I8, I16, I64, LINE_BYTES, Lanes, align_stack, fetch, place_of
from minimax_jax.ops.kernels_simd import GROUP, TABLES, decoded


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
def encode_group(_: Any, weights: Any, col: Any, limits: Any, codes: Any, ahead: Any) -> Any:
    """Codes of bfloat16 weights that have one scale: `codes[:, col : col + GROUP]`.

    Args:
        weights: bits, `[rows, cols]`.
        col: the first column.
        limits: bits of the smallest weight that has code `k` or a larger one, at place `k`, uint16 `[17]`; those of a
            scale of less than 2**100.
        codes: `[rows, cols]`.
        ahead: bytes from each weight to one that is brought to the cache meanwhile.
    """

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        align_stack(builder)
        lanes = Lanes(builder, GROUP)
        limit = [
            builder.load(builder.inttoptr(place_of(context, builder, limits, args[2], I64(code)), I16.as_pointer()))
            for code in range(17)
        ]
        encode = (_by_tables if TABLES else _by_limits)(lanes, limit)
        rows = cgutils.unpack_tuple(builder, context.make_array(codes)(context, builder, args[3]).shape, 2)[0]
        with cgutils.for_range(builder, rows) as loop:
            source = place_of(context, builder, weights, args[0], loop.index, args[1])
            code = encode(lanes.load(source, I16))
            place = place_of(context, builder, codes, args[3], loop.index, args[1])
            builder.store(code, builder.inttoptr(place, code.type.as_pointer()), align=1)
            for line in range(0, 2 * GROUP, LINE_BYTES):
                fetch(builder, builder.add(builder.add(source, args[4]), I64(line)))
        return context.get_dummy_value()

    return types.void(weights, types.intp, limits, codes, types.intp), emit


# From code 8 on, eight codes make a power of two, and the same seven bits after the exponent begin a code in each. A
# power begins where 15 rounds to 16. Of the codes below 8, the power before holds the limits of 5 to 8, the one before
# that those of 3 and 4, then come that of 2 and that of 1. Bits are told by how far `above` code 8's power they are.


def _by_tables(lanes: Lanes, limit: list[Any]) -> Callable[[Any], Any]:
    """An encoder that looks up, by the seven bits, what they add to a power of two, and which limits they reach."""
    build, first = lanes.builder, _first(lanes, limit)
    steps = [build.and_(build.trunc(build.sub(each, first), I8), I8(0x7F)) for each in limit[1:16]]
    places = [lanes.numbers(I8, 0), lanes.numbers(I8, GROUP)]
    upper = [build.add(lanes.count_reached(low, steps[8:]), lanes.constant(I8, 8)) for low in places]
    lower = [lanes.mark_reached(low, steps[:8]) for low in places]
    limits_of, below = [0] * GROUP, [0] * GROUP  # at eight times the power, modulo 64
    for power, (mine, before) in enumerate([(0x01, 0), (0x02, 1), (0x0C, 2), (0xF0, 4)], start=4):
        limits_of[8 * power], below[8 * power] = mine, before
    masks, starts = (ir.Constant(lanes.of(I8), table) for table in (limits_of, below))

    def encode(bits: Any) -> Any:
        low, high = lanes.halves(build.sub(bits, lanes.same(first)))  # with the sign where it was, unless it is small
        powers = build.and_(build.shl(high, lanes.constant(I8, 4)), lanes.constant(I8, 0x70))
        powers = build.or_(powers, build.and_(build.lshr(low, lanes.constant(I8, 4)), lanes.constant(I8, 8)))
        sign, size = build.and_(high, lanes.constant(I8, 0x80)), build.and_(high, lanes.constant(I8, 0x7F))
        code = build.or_(sign, build.add(powers, lanes.look_up(upper, low)))

        def few() -> Any:
            reached = build.and_(lanes.look_up(lower, low), lanes.pick(masks, powers))
            small = build.add(lanes.count_bits(reached), lanes.pick(starts, powers))
            held = build.icmp_unsigned(">=", size, lanes.constant(I8, 0x7E))  # else it is below code 1's power
            return build.or_(lanes.select(held, small, 0), build.xor(sign, lanes.constant(I8, 0x80)))

        is_small = build.icmp_unsigned(">=", size, lanes.constant(I8, 0x10))  # no code is 32 powers above
        return _rarely(lanes, is_small, few, code)

    return encode


def _by_limits(lanes: Lanes, limit: list[Any]) -> Callable[[Any], Any]:
    """An encoder that counts the limits that are reached."""
    build, first = lanes.builder, _first(lanes, limit)
    steps = [build.trunc(build.sub(each, first), I8) for each in limit[9:16]]

    def encode(bits: Any) -> Any:
        narrow, size = lanes.of(I8), build.and_(bits, lanes.constant(I16, 0x7FFF))
        above = build.sub(bits, lanes.same(first))
        low = build.and_(build.trunc(above, narrow), lanes.constant(I8, 0x7F))
        powers = build.trunc(build.lshr(above, lanes.constant(I16, 4)), narrow)
        powers = build.add(build.and_(powers, lanes.constant(I8, 0x78)), lanes.constant(I8, 8))
        code = build.add(powers, lanes.count_reached(low, steps))
        is_small = build.icmp_unsigned("<", size, lanes.same(first))
        code = _rarely(lanes, is_small, lambda: build.trunc(lanes.count_reached(size, limit[1:9]), narrow), code)
        sign = build.trunc(build.lshr(bits, lanes.constant(I16, 8)), narrow)
        return build.or_(code, build.and_(sign, lanes.constant(I8, 0x80)))

    return encode


def _first(lanes: Lanes, limit: list[Any]) -> Any:
    """Where the power of two of code 8 begins, whose own limit is lower."""
    return lanes.builder.sub(limit[16], I16(0x80))


def _rarely(lanes: Lanes, where: Any, few: Callable[[], Any], else_: Any) -> Any:
    """`few()` in the lanes that `where` tells, which is made only if there are any."""
    build = lanes.builder
    chosen = cgutils.alloca_once_value(build, else_)
    with build.if_then(build.icmp_unsigned("!=", build.bitcast(where, I64), I64(0)), likely=False):
        build.store(build.select(where, few(), else_), chosen)
    return build.load(chosen)


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
