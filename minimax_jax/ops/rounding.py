"""Exact arithmetic on single numbers: FP8 codes, scales and weights as integers and as float32.

Only operations that every backend does alike stand here: integers, and float32 products, sums and differences that are
exact or correctly rounded. Divisions are not among them (inside `jit` XLA multiplies by a reciprocal where the divisor
is constant, and its GPU division is not IEEE); nor are casts to FP8 (they overflow to NaN, and may round twice).
"""

from __future__ import annotations

from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

CODE_NAN = 0x7F
F32_INF = 0x7F800000
F32_MIN_NORMAL = 0x00800000

T = TypeVar("T")


def bits_of(x: jax.Array) -> jax.Array:
    """The bits of `x`, as unsigned integers of its size."""
    return _bitcast(x, np.dtype(f"uint{8 * x.dtype.itemsize}"))


def barrier(tree: T) -> T:
    """`tree`, computed before anything that uses it, and not simplified together with that."""
    return lax.optimization_barrier(tree)  # type: ignore[no-untyped-call, no-any-return]


def settle(x: jax.Array) -> jax.Array:
    """`x` as its dtype says, whatever made it in the same `jit`.

    XLA may skip a rounding that is widened again (float32 -> bfloat16 -> float32): `xla_allow_excess_precision`, the
    default; its GPU compiler does.
    """
    return x if x.dtype == jnp.float32 else barrier(x)


def narrow(x: jax.Array, dtype: np.dtype[Any]) -> jax.Array:
    """Float32 rounded to nearest even in float32, bfloat16 or float16, such that no compiler skips the rounding.

    bfloat16 is made of its bits, which fuses with what follows and on CPU is no slower than the cast. float16 is set
    apart by a barrier.
    """
    if dtype == jnp.bfloat16:
        return _bfloat16(x)
    return x if dtype == jnp.float32 else barrier(x.astype(dtype))


def bfloat16_bits(x: jax.Array) -> jax.Array:
    """Bits, in uint32, of float32 rounded to nearest even in bfloat16."""
    bits = bits_of(x)
    rounded = bits + 0x7FFF + ((bits >> 16) & 1)
    return jnp.where(jnp.isnan(x), bits | 0x400000, rounded) >> 16


@jax.custom_jvp
def _bfloat16(x: jax.Array) -> jax.Array:
    return _bitcast(bfloat16_bits(x).astype(jnp.uint16), jnp.bfloat16)


@_bfloat16.defjvp
def _bfloat16_jvp(primals: tuple[jax.Array], tangents: tuple[jax.Array]) -> tuple[jax.Array, jax.Array]:
    return _bfloat16(*primals), tangents[0].astype(jnp.bfloat16)  # bits alone would have no derivative


def decode(values: jax.Array) -> jax.Array:
    """Codes, float8_e4m3fn, as float32. Without denormals on the way, which would be flushed to zero."""
    bits = bits_of(values).astype(jnp.uint32)
    code = bits & 0x7F
    size = _float((code << 20) + _u32((127 - 7) << 23))  # (1 + mantissa / 8) * 2**(exponent - 7)
    size = jnp.where(code < 8, 2 * size - np.float32(2.0**-6), size)  # exponent 0: mantissa / 8 * 2**-6
    size = jnp.where(code == CODE_NAN, np.float32(np.nan), size)
    return _float(bits_of(size) | (bits & 0x80) << 24)


def scale_of_amax(amax: jax.Array) -> jax.Array:
    """Float32 `amax / 448`, rounded to nearest even; 1.0 where it is below the smallest normal, NaN where not finite.

    448 = 7 * 2**6, so this divides the significand, an integer of 24 bits, by 7. There are no ties: half an odd number
    times 7 is no integer times 4.
    """
    bits = bits_of(amax)
    significand = (bits & 0x7FFFFF) | 0x800000
    quotient = (significand << 7) // 7
    surplus = jnp.where(significand < 7 << 21, _u32(4), _u32(5))  # the quotient has 24 + surplus bits
    rounded = (quotient + (_u32(1) << (surplus - 1))) >> surplus
    exponent = (bits >> 23).astype(jnp.int32) + surplus.astype(jnp.int32) - 13
    scale = _bitcast(((exponent - 1) << 23) + rounded.astype(jnp.int32), jnp.float32)
    scale = jnp.where(exponent >= 1, scale, np.float32(1.0))
    return jnp.where(bits >= F32_INF, np.float32(np.nan), scale)


def significand_of(scale: jax.Array) -> jax.Array:
    """The significand of a normal float32, scaled to [2, 4)."""
    return _float((bits_of(scale) & 0x7FFFFF) | 0x40000000)


def limit_of(scale_inv: jax.Array) -> jax.Array:
    """Bits of the smallest magnitude that has no code: infinity, or anything but zero if the scale is not normal."""
    exponent = bits_of(scale_inv) & F32_INF
    usable = (exponent >= F32_MIN_NORMAL) & (exponent < F32_INF)
    return jnp.where(usable, jnp.uint32(F32_INF), jnp.uint32(1))


def usable(scale_inv: jax.Array, limit: jax.Array) -> jax.Array:
    """The scale, or 1.0 in place of one that is not normal; `limit` is from `limit_of`."""
    return jnp.where(limit > 1, scale_inv, np.float32(1.0))


def code_bits(x: jax.Array, scale: jax.Array, reciprocal: jax.Array, limit: jax.Array) -> jax.Array:
    """Codes, uint32, of float32 `x / scale`: `nearest_code` with the sign, and NaN from `limit` on.

    Args:
        x: float32 of any kind.
        scale: from `usable`, shaped as `x`.
        reciprocal: as in `nearest_code`.
        limit: from `limit_of`, shaped as `x`.
    """
    code = nearest_code(jnp.abs(x), scale, reciprocal)
    code = jnp.where((bits_of(x) & 0x7FFFFFFF) >= limit, jnp.uint32(CODE_NAN), code)
    return code | ((bits_of(x) ^ bits_of(scale)) >> 24) & 0x80


def nearest_code(x: jax.Array, scale: jax.Array, reciprocal: jax.Array) -> jax.Array:
    """Magnitude codes, uint32, of float32 `x / |scale|`, rounded to nearest even and saturated, without a division.

    An estimate of the quotient finds the two codes around it; the sign of `x - |scale| * midpoint` chooses. That
    difference is exact where it matters: `scale` is split in two halves of 12 bits, a midpoint has at most 5, so both
    products are exact, and so is the difference of numbers this close (Sterbenz). What float32 division would round
    to the midpoint is a tie: all within half a unit in the last place of it.

    Args:
        x: magnitudes, float32.
        scale: normal float32 of either sign, shaped as `x`.
        reciprocal: about `1 / significand_of(scale)`; an error of a few units in the last place does no harm.
    """
    significand = significand_of(scale)
    x = x * _float(_u32(255 << 23) - (bits_of(scale) & F32_INF))  # by a power of two: now to divide by significand
    # At most 440, halfway from the last midpoint to the last code, so that no code above that comes out.
    estimate = jnp.minimum(x * reciprocal, np.float32(440.0))
    # Codes below 2**-6 are spaced as those of the octave above it, and moved there; the others are moved by an octave.
    # Of the two the larger is right, and on the way back the smaller: one cut through the bits serves all.
    bits = bits_of(jnp.maximum(estimate + np.float32(2.0**-6), estimate + estimate))
    midpoint = _float(bits & _u32(0xFFF00000) | 0x80000)
    midpoint = jnp.minimum(midpoint - np.float32(2.0**-6), midpoint * np.float32(0.5))
    high = _float(bits_of(significand) & _u32(0xFFFFF000))
    above = (x - midpoint * high) - midpoint * (significand - high)
    half_ulp = _float(bits_of(midpoint) & F32_INF) * (significand * np.float32(2.0**-24))
    code = bits >> 20
    up = (above > half_ulp) | ((code & 1 == 1) & (above >= -half_ulp))
    return code - jnp.where(up, _u32((121 << 3) - 1), _u32(121 << 3))


def _u32(number: int) -> jax.Array:
    return jnp.asarray(number, jnp.uint32)  # a bare int above INT32_MAX does not convert


def _float(bits: jax.Array) -> jax.Array:
    return _bitcast(bits, jnp.float32)


def _bitcast(x: jax.Array, dtype: Any) -> jax.Array:
    return lax.bitcast_convert_type(x, dtype)
