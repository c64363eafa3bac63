"""How far two forms of one weight are apart: in absolute terms, in units of the last place, relative, in direction.

Both are rounded to the less precise dtype of the two first, as `compare` does, so that a bf16 copy of an FP8 weight
does not differ from it. All arithmetic after that is in float64.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from minimax_jax.dtypes import NAMES
from minimax_jax.jobs.compare import Weight, are_identical, bytes_of, in_common_dtype

Array = npt.NDArray[Any]

_BITS: Mapping[str, type[np.signedinteger[Any]]] = {"BF16": np.int16, "F16": np.int16, "F32": np.int32}
"""Signed integers of the same size, by float dtype."""

RELATIVE = "norm of the difference over the larger of the two norms"
"""What `Difference.relative` is, for those who are shown one."""

_AT_ONCE = 2**17
"""Elements: float64 copies of so many stay in the cache of a core, and memory stays flat."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Difference:
    """How far a weight, or a part of it, is from its counterpart.

    Every figure but `differing` and `non_finite` is over the elements that are finite in both. A weight that is the
    same all over has sums of zero: what is made of them says so too.

    Attributes:
        elements: how many there are.
        differing: how many differ in value; NaN is the same as NaN, and -0 as 0.
        non_finite: how many of these are NaN or infinite on either side.
        max_abs: largest absolute difference.
        max_ulp: largest difference in units of the last place: how many steps between neighbouring numbers of the
            common dtype lie between the two.
        first_squares: sum of the squares of the first.
        second_squares: that of the second.
        products: sum of the products of the two.
        error_squares: sum of the squares of their difference.
    """

    elements: int
    differing: int = 0
    non_finite: int = 0
    max_abs: float = 0.0
    max_ulp: int = 0
    first_squares: float = 0.0
    second_squares: float = 0.0
    products: float = 0.0
    error_squares: float = 0.0

    def __add__(self, other: Difference) -> Difference:
        """Of both parts together."""
        most = {name: max(getattr(self, name), getattr(other, name)) for name in ("max_abs", "max_ulp")}
        sums = {name: getattr(self, name) + getattr(other, name) for name in self.__slots__ if name not in most}
        return Difference(**sums, **most)

    @property
    def relative(self) -> float:
        """Norm of the difference over the larger of the two norms: 0 for the same, 1 against zeros, 2 at most.

        It is the same either way round, and a number for whatever is compared. All that tells a relative difference, of
        one weight or of several taken together, has it from here.
        """
        largest = max(self.first_squares, self.second_squares)
        return math.sqrt(self.error_squares / largest) if largest else 0.0

    @property
    def cosine(self) -> float:
        """Cosine of the angle between the two: 1 for the same direction, and 0 against zeros."""
        if not self.differing or not self.error_squares:
            return 1.0
        norms = math.sqrt(self.first_squares) * math.sqrt(self.second_squares)
        return min(max(self.products / norms, -1.0), 1.0) if norms else 0.0


def difference(first: Weight, second: Weight, *, part: bool = False) -> Difference:
    """How far two weights of one shape are apart.

    Args:
        first: a weight.
        second: its counterpart.
        part: whether these are rows of a weight: then their sums count even where they are the same. Those of a whole
            weight that is the same do not, and cost nothing.
    """
    same = Difference(elements=first.values.size)
    if not part and are_identical(first, second):
        return same
    a, b = (np.ascontiguousarray(floats).reshape(-1) for floats in in_common_dtype(first, second))
    if not part and np.array_equal(bytes_of(a), bytes_of(b)):
        return same
    return total(_difference(a[at : at + _AT_ONCE], b[at : at + _AT_ONCE]) for at in range(0, a.size, _AT_ONCE))


def total(parts: Iterable[Difference]) -> Difference:
    """The difference of a whole from those of its parts."""
    return functools.reduce(Difference.__add__, parts, Difference(elements=0))


def inner(x: Array, y: Array) -> float:
    """Sum of the products of two float64 vectors, on this thread alone: BLAS would wait for threads of its own."""
    return float(np.einsum("i,i->", x, y))


def _difference(a: Array, b: Array) -> Difference:
    """Of two vectors of one float dtype."""
    with np.errstate(invalid="ignore"):  # a signalling NaN
        x, y = a.astype(np.float64), b.astype(np.float64)
    differs = (x != y) & ~(np.isnan(x) & np.isnan(y))
    finite = np.isfinite(x) & np.isfinite(y)
    steps = np.abs(_ordered(a) - _ordered(b))[finite]
    x, y = x[finite], y[finite]
    error = x - y
    return Difference(
        elements=a.size,
        differing=int(np.count_nonzero(differs)),
        non_finite=int(np.count_nonzero(differs & ~finite)),
        max_abs=float(np.max(np.abs(error), initial=0.0)),
        max_ulp=int(np.max(steps, initial=0)),
        first_squares=inner(x, x),
        second_squares=inner(y, y),
        products=inner(x, y),
        error_squares=inner(error, error),
    )


def _ordered(floats: Array) -> npt.NDArray[np.int64]:
    """Floats as integers in the same order, with neighbours one apart, and -0 at 0.

    Bits without the sign count up from zero (IEEE 754), so that the sign is all that is left to apply.
    """
    bits = floats.view(_BITS[NAMES[floats.dtype]])
    magnitude = (bits & np.iinfo(bits.dtype).max).astype(np.int64)
    ordered: npt.NDArray[np.int64] = np.where(bits < 0, -magnitude, magnitude)
    return ordered
