"""One weight in two checkpoints: are they the same bytes, the same values, or neither?"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from minimax_jax.dtypes import DTYPES, NAMES

Array: TypeAlias = npt.NDArray[Any]
Relation: TypeAlias = Literal["identical", "equal", "different"]
"""identical: the same bytes. equal: the same values in the less precise dtype of the two. different: neither."""

RELATIONS: tuple[Relation, ...] = ("identical", "equal", "different")

_PRECISION = ("BF16", "F16", "F32")
"""Float dtypes from the least precise on; FP8 weights count as float32, which holds every `code * scale`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """One weight in two checkpoints.

    Attributes:
        key: its Hugging Face name.
        relation: whether bytes or values agree.
        dtypes: stored dtype in the first and in the second checkpoint.
        differing: how many elements differ in value.
        max_abs: largest absolute difference; NaN where a NaN stands against a number.
    """

    key: str
    relation: Relation
    dtypes: tuple[str, str]
    differing: int = 0
    max_abs: float = 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Weight:
    """A weight as it is stored, or some rows of it.

    Attributes:
        values: floats, or FP8 codes `[rows, cols]`.
        scales: block scales of FP8 codes.
        block: rows and columns of one block.
    """

    values: Array
    scales: Array | None = None
    block: tuple[int, int] = (1, 1)

    def floats(self, name: str) -> Array:
        """The weight rounded to the float dtype `name`; its own values where they have that dtype already."""
        if self.scales is None:
            return self.values.astype(DTYPES[name], copy=False)
        from minimax_jax.ops.fp8 import dequantize  # with jax, which the names in this module do not need

        return np.asarray(dequantize(self.values, self.scales, DTYPES[name], block=self.block))


def compare(key: str, first: Weight, second: Weight) -> Comparison:
    """Compare two weights of one shape."""
    dtypes = (NAMES[first.values.dtype], NAMES[second.values.dtype])
    if are_identical(first, second):
        return Comparison(key=key, relation="identical", dtypes=dtypes)
    a, b = in_common_dtype(first, second)
    if np.array_equal(bytes_of(a), bytes_of(b)):  # the usual case, and much less work than the general one
        return Comparison(key=key, relation="equal", dtypes=dtypes)
    a, b = (floats.astype(np.float32, copy=False) for floats in (a, b))  # which holds every value of the others
    differs = (a != b) & ~(np.isnan(a) & np.isnan(b))
    if not differs.any():
        return Comparison(key=key, relation="equal", dtypes=dtypes)
    with np.errstate(invalid="ignore", over="ignore"):
        worst = float(np.max(np.abs(a[differs] - b[differs])))
    return Comparison(key=key, relation="different", dtypes=dtypes, differing=int(differs.sum()), max_abs=worst)


def merge(chunks: Sequence[Comparison]) -> Comparison:
    """One comparison for a weight that was compared in chunks."""
    return dataclasses.replace(
        chunks[0],
        relation=max((chunk.relation for chunk in chunks), key=RELATIONS.index),
        differing=sum(chunk.differing for chunk in chunks),
        max_abs=float(np.max([chunk.max_abs for chunk in chunks])),
    )


def bytes_of(tensor: Array) -> Array:
    """The bytes of a tensor in row-major order, uint8 `[nbytes]`; a view where it lies so in memory, else a copy."""
    return np.ascontiguousarray(tensor).reshape(-1).view(np.uint8)


def in_common_dtype(first: Weight, second: Weight) -> tuple[Array, Array]:
    """Both weights as floats of the less precise dtype of the two; views where they have it already."""
    names = (_float_name(NAMES[weight.values.dtype]) for weight in (first, second))
    common = min(names, key=_PRECISION.index)
    return first.floats(common), second.floats(common)


def are_identical(first: Weight, second: Weight) -> bool:
    """Whether they are stored as the same bytes, scales included."""
    if first.values.dtype != second.values.dtype or not np.array_equal(bytes_of(first.values), bytes_of(second.values)):
        return False
    if first.scales is None or second.scales is None:
        return True
    return first.block == second.block and np.array_equal(bytes_of(first.scales), bytes_of(second.scales))


def _float_name(name: str) -> str:
    return "F32" if name == "F8_E4M3" else name
