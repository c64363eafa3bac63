"""Grouping, ungrouping, decoding and encoding of concrete arrays on a CPU: the same functions as in `assemble`.

Each returns None for what the kernels do not cover, and that is left to XLA: mixed or wrong shapes and dtypes, changes
between float dtypes, scales that are not ordinary, weights to be quantised that are not finite.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from types import ModuleType
from typing import Any, TypeAlias

import jax
import numpy as np

from minimax_jax.ops import checks
from minimax_jax.ops.checks import Array, Block
from minimax_jax.ops.fp8 import FP8
from minimax_jax.ops.host import (
    BITS,
    Place,
    bits,
    empty,
    kernels_for,
    on_host,
    ordinary,
    place_of,
    run,
    units,
)
from minimax_jax.ops.scaled import BlockScaled
from minimax_jax.ops.workspace import HostArray

Matrix: TypeAlias = Array | BlockScaled
Parts: TypeAlias = list[tuple[Matrix, ...]]
Dtype: TypeAlias = np.dtype[Any] | None


def assemble(experts: Sequence[Sequence[Matrix]], dtype: Dtype) -> Matrix | None:
    """As `minimax_jax.ops.assemble.assemble`."""
    kernels = kernels_for(experts)
    if kernels is None or not _alike(experts):
        return None
    work = _Work(kernels=kernels, place=place_of(experts))
    parts = [[jax.tree.map(on_host, matrix) for matrix in expert] for expert in experts]
    first = parts[0][0]
    if not isinstance(first, BlockScaled):
        return work.group(parts) if dtype in (None, first.dtype) else None
    return work.group_scaled(parts) if dtype is None else work.decode_group(parts, dtype)


def split(grouped: Matrix, parts: int, dtype: Dtype, *, block: Block, source: Array | None) -> Parts | None:
    """As `minimax_jax.ops.assemble.split`."""
    kernels = kernels_for((grouped, source))
    if kernels is None or len(grouped.shape) != 3 or parts < 1 or grouped.shape[2] % parts or not _sound(grouped):
        return None
    work = _Work(kernels=kernels, place=place_of((grouped, source)))
    grouped = jax.tree.map(on_host, grouped)
    if dtype in (None, grouped.dtype):
        return work.ungroup_scaled(grouped) if isinstance(grouped, BlockScaled) else work.ungroup(grouped, parts)
    if isinstance(grouped, BlockScaled):
        return work.decode_ungroup(grouped, dtype)
    return work.encode_ungroup(grouped, source, (block[1], block[0]), parts) if dtype == FP8 else None


def encode(matrix: Matrix, dtype: np.dtype[Any], *, block: Block, parts: int, source: Array | None) -> Matrix | None:
    """As `minimax_jax.ops.assemble.encode`."""
    if isinstance(matrix, BlockScaled):
        return _dequantize(matrix, dtype)
    if dtype != FP8 or (parts > 1 and source is not None):  # there, all parts keep their scales or none
        return None
    done = quantize(matrix, source, block=block, parts=parts)
    return None if done is None else done[0]


def quantize(x: Array, source: Array | None, *, block: Block, parts: int) -> tuple[BlockScaled, HostArray] | None:
    """FP8 form of weights `[..., rows, parts*cols]`, each part of each matrix by itself.

    Args:
        x: weights, float32, bfloat16 or float16.
        source: the scales they had, float32 `[..., grid rows, parts*grid cols]`. A part that they reproduce in all bits
            keeps them; any other gets scales by amax.
        block: rows and columns of one block.
        parts: equal parts of the last axis, each with its own grid.

    Returns:
        New codes and scales, and which parts kept theirs, bool `[..., parts]`; None where the kernels do not cover it.
    """
    kernels = kernels_for((x, source))
    if kernels is None or checks.weight_problems(x, source, block, parts):
        return None
    place, weights = place_of((x, source)), bits(on_host(x)).reshape(-1, *x.shape[-2:])
    codes = empty(x.shape, FP8)
    targets = [(target,) * parts for target in bits(codes).reshape(weights.shape)]
    encoded = _encode(kernels, weights, source, block, targets, transposed=False)
    if encoded is None:
        return None
    scales, kept = encoded
    grid = checks.grid_shape(x.shape, block, parts=parts)
    scaled = BlockScaled(values=place(codes), scale_inv=place(scales.reshape(grid)), block=block, parts=parts)
    return scaled, kept.reshape(*x.shape[:-2], parts)


def _dequantize(matrix: BlockScaled, dtype: np.dtype[Any]) -> Array | None:
    kernels = kernels_for(matrix)
    if kernels is None or dtype not in BITS or not _sound(matrix) or not ordinary(np.asarray(matrix.scale_inv)):
        return None
    values, scales = on_host(matrix.values), on_host(matrix.scale_inv)
    out = empty(matrix.shape, dtype)
    each = zip(*(array.reshape(-1, *array.shape[-2:]) for array in (bits(values), scales, bits(out))), strict=True)
    run(partial(kernels.decode, codes, grid, matrix.block, matrix.parts, target) for codes, grid, target in each)
    return place_of(matrix)(out)


@dataclass(frozen=True, kw_only=True)
class _Work:
    """The kernels at work on read-only numpy arrays that fit each other.

    Attributes:
        kernels: `minimax_jax.ops.kernels_numba`.
        place: makes of a result what is given back; see `place_of`.
    """

    kernels: ModuleType
    place: Place

    def group(self, experts: Sequence[Sequence[Array]]) -> Array:
        rows, cols = experts[0][0].shape
        out = empty((len(experts), cols, len(experts[0]) * rows), experts[0][0].dtype)
        each = zip(experts, units(out), strict=True)
        run(partial(self.kernels.transpose, tuple(map(units, parts)), target) for parts, target in each)
        return self.place(out)

    def group_scaled(self, experts: Sequence[Sequence[BlockScaled]]) -> BlockScaled:
        parts, block = len(experts[0]), experts[0][0].block
        values = self.group([[part.values for part in expert] for expert in experts])
        scales = np.stack([np.concatenate([part.scale_inv for part in expert]).T for expert in experts])
        return BlockScaled(values=values, scale_inv=self.place(scales), block=(block[1], block[0]), parts=parts)

    def decode_group(self, experts: Sequence[Sequence[BlockScaled]], dtype: np.dtype[Any]) -> Array | None:
        if dtype not in BITS or not all(ordinary(part.scale_inv) for expert in experts for part in expert):
            return None
        (rows, cols), block = experts[0][0].shape, experts[0][0].block
        out = empty((len(experts), cols, len(experts[0]) * rows), dtype)

        def decode(parts: Sequence[BlockScaled], target: HostArray) -> None:
            codes, scales = tuple(bits(part.values) for part in parts), tuple(part.scale_inv for part in parts)
            self.kernels.decode_transposed(codes, scales, block, target)

        run(partial(decode, parts, target) for parts, target in zip(experts, bits(out), strict=True))
        return self.place(out)

    def ungroup(self, grouped: Array, parts: int) -> Parts:
        out = _empty_parts(grouped, parts, grouped.dtype)
        run(
            partial(self.kernels.transpose, (source,), units(target))
            for expert, targets in zip(units(grouped), out, strict=True)
            for source, target in zip(np.split(expert, parts, axis=1), targets, strict=True)
        )
        return [tuple(map(self.place, expert)) for expert in out]

    def ungroup_scaled(self, grouped: BlockScaled) -> Parts:
        return self._scaled(self.ungroup(grouped.values, grouped.parts), grouped.scale_inv, grouped.block)

    def decode_ungroup(self, grouped: BlockScaled, dtype: np.dtype[Any]) -> Parts | None:
        if dtype not in BITS or not ordinary(grouped.scale_inv):
            return None
        out = _empty_parts(grouped.values, grouped.parts, dtype)

        def decode(codes: HostArray, scales: HostArray, target: HostArray) -> None:
            self.kernels.decode_transposed((codes,), (on_host(scales),), grouped.block, bits(target))

        run(
            partial(decode, *three)
            for expert in zip(bits(grouped.values), grouped.scale_inv, out, strict=True)
            for three in zip(*(np.split(array, grouped.parts, axis=1) for array in expert[:2]), expert[2], strict=True)
        )
        return [tuple(map(self.place, expert)) for expert in out]

    def encode_ungroup(self, grouped: Array, source: Array | None, block: Block, parts: int) -> Parts | None:
        if checks.weight_problems(grouped, source, block, parts):
            return None
        out = _empty_parts(grouped, parts, FP8)
        targets = [tuple(map(bits, expert)) for expert in out]
        encoded = _encode(self.kernels, bits(grouped), source, block, targets, transposed=True)
        if encoded is None:
            return None
        return self._scaled([tuple(map(self.place, expert)) for expert in out], encoded[0], block)

    def _scaled(self, values: Sequence[Sequence[Any]], scales: Array, block: Block) -> Parts:
        """Ungrouped codes with their scales, which are still grouped, in blocks of `block`."""
        return [
            tuple(
                BlockScaled(values=codes, scale_inv=self.place(grid.T.copy()), block=(block[1], block[0]))
                for codes, grid in zip(expert, np.split(grids, len(expert), axis=1), strict=True)
            )
            for expert, grids in zip(values, scales, strict=True)
        ]


def _encode(
    kernels: ModuleType,
    weights: HostArray,
    source: Array | None,
    block: Block,
    targets: Sequence[Sequence[HostArray]],
    *,
    transposed: bool,
) -> tuple[HostArray, HostArray] | None:
    """Fill `targets[matrix][part]` with the codes of `weights [matrices, rows, parts*cols]`, seen as bits.

    Returns:
        Scales `[matrices, grid rows, parts*grid cols]`, and which parts kept those of `source`, bool
        `[matrices, parts]`; None where the kernels do not cover it.
    """
    parts = len(targets[0])
    cols, grid = weights.shape[2] // parts, checks.grid_shape(weights.shape, block, parts=parts)
    scales = empty(grid, np.float32)
    if source is not None:
        scales[:] = np.asarray(source).reshape(grid)
        if not ordinary(scales) or not np.all(scales > 0):
            return None

    def encode(matrix: int, part: int) -> tuple[int, bool]:
        mine = np.split(scales[matrix], parts, axis=1)[part]
        attempt = partial(kernels.encode, weights[matrix], part * cols, cols, block, mine)
        target = targets[matrix][part]
        if source is not None and attempt(True, target, transposed) == kernels.DONE:
            return kernels.DONE, True
        return attempt(False, target, transposed), False

    each = itertools.product(range(len(weights)), range(parts))
    states = run(partial(encode, matrix, part) for matrix, part in each)
    if any(state != kernels.DONE for state, _ in states):
        return None
    return scales, np.array([kept for _, kept in states]).reshape(-1, parts)


def _empty_parts(grouped: Array, parts: int, dtype: Any) -> list[tuple[HostArray, ...]]:
    experts, cols, rows = grouped.shape[0], grouped.shape[1], grouped.shape[2] // parts
    return [tuple(empty((rows, cols), dtype) for _ in range(parts)) for _ in range(experts)]


def _alike(experts: Sequence[Sequence[Matrix]]) -> bool:
    """Whether all experts are of the same parts, and these go side by side."""
    matrices = list(itertools.chain(*experts))
    kinds = {(type(m), m.shape, m.dtype, getattr(m, "block", None), getattr(m, "parts", 1)) for m in matrices}
    if len(kinds) != 1 or len({len(expert) for expert in experts}) != 1 or len(matrices[0].shape) != 2:
        return False
    return getattr(matrices[0], "parts", 1) == 1 and all(map(_sound, matrices))


def _sound(matrix: Matrix) -> bool:
    """Whether scales fit their codes: kernels check no bounds, and a node of a pytree may hold any two leaves."""
    if not isinstance(matrix, BlockScaled):
        return True
    return not checks.scaled_problems(matrix.values, matrix.scale_inv, matrix.block, matrix.parts)
