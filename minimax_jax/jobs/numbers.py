"""Numbers that a sound checkpoint does not hold: NaN, infinity, and scales that are negative, zero or subnormal.

They are counted on the bits: arithmetic may flush subnormals, and a signalling NaN may raise an alarm.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from minimax_jax.dtypes import NAMES

_FLOATS = {"BF16": (np.uint16, 7, 8), "F16": (np.uint16, 10, 5), "F32": (np.uint32, 23, 8)}
"""Unsigned integer of the same size, bits of the mantissa, bits of the exponent."""

_AT_ONCE = 2**17
"""Elements: what is made of so many stays in the cache of a core, which more than doubles the speed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Unusual:
    """Unusual numbers of one kind in one stored tensor."""

    key: str
    what: str
    count: int


def unusual(key: str, tensor: npt.NDArray[Any], *, is_scale: bool) -> Iterator[Unusual]:
    """Every kind of unusual number in a tensor, with its count; other dtypes than FP8 and floats have none.

    Args:
        key: its name.
        tensor: as it is stored, any shape.
        is_scale: whether its elements are block scales: then zero, negative and subnormal ones count as well.
    """
    flat = np.ascontiguousarray(tensor).reshape(-1)
    counts: Counter[str] = Counter()
    for start in range(0, flat.size, _AT_ONCE):
        for what, count in _counts(flat[start : start + _AT_ONCE], is_scale=is_scale):
            counts[what] += int(count)
    return (Unusual(key=key, what=what, count=count) for what, count in counts.items() if count)


def merged(found: Iterable[Unusual]) -> tuple[Unusual, ...]:
    """The same with one record per tensor and kind, in the order in which they came."""
    counts: Counter[tuple[str, str]] = Counter()
    for each in found:
        counts[each.key, each.what] += each.count
    return tuple(Unusual(key=key, what=what, count=count) for (key, what), count in counts.items())


def _counts(flat: npt.NDArray[Any], *, is_scale: bool) -> Iterator[tuple[str, Any]]:
    name = NAMES[flat.dtype]
    if name == "F8_E4M3":  # which has two codes that are NaN, and no infinity
        magnitude = flat.view(np.uint8) & np.uint8(0x7F)
        yield "NaN", np.count_nonzero(magnitude == 0x7F) if magnitude.max() == 0x7F else 0
    if name not in _FLOATS:
        return
    integer, mantissa, exponent = _FLOATS[name]
    bits = flat.view(integer)
    infinity = integer(((1 << exponent) - 1) << mantissa)
    magnitude = bits & integer((1 << mantissa + exponent) - 1)
    largest = magnitude.max()  # which is found faster than anything is counted
    yield "NaN", np.count_nonzero(magnitude > infinity) if largest > infinity else 0
    yield "infinity", np.count_nonzero(magnitude == infinity) if largest >= infinity else 0
    if is_scale:
        yield "zero scale", np.count_nonzero(magnitude == 0)
        yield "subnormal scale", np.count_nonzero((magnitude > 0) & (magnitude < integer(1 << mantissa)))
        yield "negative scale", np.count_nonzero((bits > magnitude) & (magnitude > 0) & (magnitude <= infinity))
