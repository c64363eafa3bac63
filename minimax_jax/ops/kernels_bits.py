"""Weights and the bits that the kernels see them as: bfloat16 as uint16, float16 as int16, float32 as uint32."""

from __future__ import annotations

from typing import Any

import llvmlite.ir as ir
import numpy as np
from numba import types
from numba.extending import intrinsic, overload, register_jitable

from minimax_jax.ops.kernels_simd import TABLES

U8, U16, U32 = np.uint8, np.uint16, np.uint32


@intrinsic  # type: ignore[untyped-decorator]
def bits_of(_: Any, x: Any) -> Any:
    """The bits of a float32."""

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], ir.IntType(32))

    return types.uint32(types.float32), emit


@intrinsic  # type: ignore[untyped-decorator]
def float_of(_: Any, bits: Any) -> Any:
    """The float32 of these bits."""

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], ir.FloatType())

    return types.float32(types.uint32), emit


@intrinsic  # type: ignore[untyped-decorator]
def float_of_half(_: Any, half: Any) -> Any:
    """The float32 that a float16 of these bits is."""

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.fpext(builder.bitcast(args[0], ir.HalfType()), ir.FloatType())

    return types.float32(types.uint16), emit


@intrinsic  # type: ignore[untyped-decorator]
def half_of_float(_: Any, x: Any) -> Any:
    """The bits of the float16 nearest to a float32."""

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(builder.fptrunc(args[0], ir.HalfType()), ir.IntType(16))

    return types.uint16(types.float32), emit


@register_jitable  # type: ignore[untyped-decorator]
def float_of_code(code: Any) -> Any:
    """A code as float32, divided by 256: read as a float16, whose exponents begin 8 lower. NaN stays NaN."""
    half = U16((U16(np.int16(np.int8(code))) << U16(7)) & U16(0xBFFF))
    if U8(code) & U8(0x7F) == U8(0x7F):
        half = U16(half ^ U16(0x4180))  # 0x3F80, 1.875, to the quiet NaN 0x7E00
    return float_of_half(half)


@register_jitable  # type: ignore[untyped-decorator]
def size_of(bits: Any, like: Any) -> Any:
    """Bits without their sign: they are ordered as the magnitudes are, NaN above all."""
    narrow = like.dtype.type  # else numba widens to 64 bits
    return narrow(bits & narrow((1 << (8 * like.itemsize - 1)) - 1))


def is_bfloat16(weights: Any) -> bool:
    """Whether these are the bits of bfloat16."""
    raise NotImplementedError


@overload(is_bfloat16)  # type: ignore[untyped-decorator]
def _is_bfloat16_overload(weights: Any) -> Any:
    found = bool(weights.dtype == types.uint16)

    def answer(weights: Any) -> bool:
        return found

    return answer


def has_table(weights: Any) -> bool:
    """Whether weights of their type are looked up; see `kernels_simd.look_up_turned`."""
    raise NotImplementedError


@overload(has_table)  # type: ignore[untyped-decorator]
def _has_table_overload(weights: Any) -> Any:
    found = TABLES and weights.dtype != types.uint32

    def answer(weights: Any) -> bool:
        return found

    return answer


def rounded(x: Any, like: Any) -> Any:
    """`x`, float32, rounded to nearest even to what the elements of `like` are the bits of."""
    raise NotImplementedError


@overload(rounded)  # type: ignore[untyped-decorator]
def _rounded_overload(x: Any, like: Any) -> Any:
    def bfloat16(x: Any, like: Any) -> Any:
        bits = bits_of(x)  # of a NaN, those of `float_of_code`: the sum leaves its upper half alone
        return U16(U32(bits + U32(0x7FFF) + ((bits >> U32(16)) & U32(1))) >> U32(16))

    def float16(x: Any, like: Any) -> Any:
        return np.int16(half_of_float(x))

    def float32(x: Any, like: Any) -> Any:
        return bits_of(x)

    return {types.uint16: bfloat16, types.int16: float16, types.uint32: float32}[like.dtype]


def widened(bits: Any) -> Any:
    """The weight of these bits as float32; the inverse of `rounded`."""
    raise NotImplementedError


@overload(widened)  # type: ignore[untyped-decorator]
def _widened_overload(bits: Any) -> Any:
    def bfloat16(bits: Any) -> Any:
        return float_of(U32(U32(bits) << U32(16)))

    def float16(bits: Any) -> Any:
        return float_of_half(U16(bits))

    def float32(bits: Any) -> Any:
        return float_of(bits)

    return {types.uint16: bfloat16, types.int16: float16, types.uint32: float32}[bits]
