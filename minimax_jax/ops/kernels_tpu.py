"""The codec of grouped experts as kernels for TPUs: every byte passes through the chip's memory once.

XLA transposes in memory, before or after the arithmetic; a kernel does both on a block while it is at hand. The
arithmetic is that of `minimax_jax.ops.rounding`, to the same bits. Blocks are of 128 x 128, and matrices whole blocks.

The grid goes over experts, columns, parts and rows, in this order. A part whose turn it is not keeps the block that it
has: the first before its turn, the last after it. So each block is read or written once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from minimax_jax.ops.experts import ungroup
from minimax_jax.ops.on_tpu import SIDE
from minimax_jax.ops.rounding import (
    CODE_NAN,
    bits_of,
    code_bits,
    limit_of,
    scale_of_amax,
    significand_of,
    usable,
)

_TILE = (512, 1024)
"""Rows and columns of the matrices that are at hand at a time, at most."""
_TURNS = (4, 2, 1)
"""Blocks that one turn of the loop does, if they divide: their instructions fill each other's gaps."""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How the matrices of some experts are divided.

    Attributes:
        experts: how many.
        parts: matrices of an expert, which stand side by side when grouped.
        rows: of one matrix.
        cols: of one matrix.
    """

    experts: int
    parts: int
    rows: int
    cols: int

    @property
    def tile(self) -> tuple[int, int]:
        """Rows and columns that are at hand at a time."""
        return _divisor(self.rows, _TILE[0]), _divisor(self.cols, _TILE[1])

    @property
    def grid(self) -> tuple[int, int, int, int]:
        """Steps over experts, columns, parts and rows."""
        rows, cols = self.tile
        return self.experts, self.cols // cols, self.parts, self.rows // rows

    def codes(self) -> list[pl.BlockSpec]:
        """Blocks of each part's codes, [experts, rows, cols]."""
        steps = self.grid[3]

        def of(part: int) -> pl.BlockSpec:
            return pl.BlockSpec((1, *self.tile), lambda e, c, p, r, *_: (e, _held((p - part) * steps + r, steps), c))

        return [of(part) for part in range(self.parts)]

    def scales(self) -> list[pl.BlockSpec]:
        """Each part's scales of one expert, to be read or written one by one."""
        shape = (1, self.rows // SIDE, self.cols // SIDE)
        spec = pl.BlockSpec(shape, lambda e, c, p, r, *_: (e, 0, 0), memory_space=pltpu.SMEM)
        return [spec] * self.parts

    def grouped(self) -> pl.BlockSpec:
        """Blocks of grouped weights, [experts, cols, parts * rows]; behind `at`, if there is one."""
        (rows, cols), steps = self.tile, self.grid[3]
        return pl.BlockSpec((1, cols, rows), lambda e, c, p, r, *at: (sum((one[0] for one in at), e), c, p * steps + r))

    def shape(self, what: str) -> tuple[int, int, int]:
        """Of `codes` or `scales` of a part, or of all that is `grouped`."""
        shapes = {
            "codes": (self.rows, self.cols),
            "scales": (self.rows // SIDE, self.cols // SIDE),
            "grouped": (self.cols, self.parts * self.rows),
        }
        return self.experts, *shapes[what]

    def cost(self) -> pl.CostEstimate:
        """What a kernel reads and writes: codes, scales and bfloat16 weights, each once."""
        codes = self.parts * self.experts * self.rows * self.cols
        return pl.CostEstimate(flops=0, transcendentals=0, bytes_accessed=3 * codes + 4 * codes // SIDE**2)


def dequantize_grouped(*arrays: jax.Array, parts: int, interpret: bool = False) -> list[jax.Array]:
    """Grouped bfloat16 weights of each part's codes [experts, rows, cols], behind which come each part's scales."""
    layout = _layout_of(arrays[0], parts)
    out = _array(layout.shape("grouped"), jnp.bfloat16, arrays[0])
    return _call(_dequantize, layout, arrays, [out], interpret)


def dequantize_into(
    bits: jax.Array, at: jax.Array, *arrays: jax.Array, parts: int, interpret: bool = False
) -> list[jax.Array]:
    """The same, as bits, in place of the experts of `bits` [experts, cols, parts * rows] from `at` on, int32 [1]."""
    layout = _layout_of(arrays[0], parts)
    out = _array(bits.shape, bits.dtype, bits)
    return _call(_dequantize, layout, (at, bits, *arrays), [out], interpret, into=True)


def quantize_grouped(weights: jax.Array, *scale_inv: jax.Array, parts: int, interpret: bool = False) -> list[jax.Array]:
    """Each part's codes of grouped bfloat16 weights; behind them each part's scales, unless they are given, grouped."""
    scales = [part for grid in scale_inv for part in ungroup(grid, parts)]
    experts, cols, rows = weights.shape
    layout = Layout(experts=experts, parts=parts, rows=rows // parts, cols=cols)
    out = [_array(layout.shape("codes"), jnp.float8_e4m3fn, weights)] * parts
    if not scales:
        out += [_array(layout.shape("scales"), jnp.float32, weights)] * parts
    return _call(_quantize, layout, (weights, *scales), out, interpret)


def _call(
    kernel: Callable[..., None],
    layout: Layout,
    arrays: Sequence[jax.Array],
    out: Sequence[jax.ShapeDtypeStruct],
    interpret: bool,
    into: bool = False,
) -> list[jax.Array]:
    def specs(found: Sequence[Any]) -> list[pl.BlockSpec]:
        """Blocks of all arrays of one side; the parts of a kind come one after the other."""
        kinds = {np.dtype(jnp.float8_e4m3fn): iter(layout.codes()), np.dtype(np.float32): iter(layout.scales())}
        return [next(kinds[array.dtype]) if array.dtype in kinds else layout.grouped() for array in found]

    skipped = 2 if into else 0
    whole = [pl.BlockSpec(memory_space=pl.ANY)] if into else []
    grid = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=int(into),
        grid=layout.grid,
        in_specs=[*whole, *specs(arrays[skipped:])],
        out_specs=specs(out),
    )
    results: list[jax.Array] = pl.pallas_call(
        lambda *refs: kernel(layout, *refs[skipped:]),
        grid_spec=grid,
        out_shape=list(out),
        input_output_aliases={1: 0} if into else {},
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", *("arbitrary",) * 3)),
        cost_estimate=layout.cost(),
        interpret=interpret,
        name=kernel.__name__.strip("_"),
    )(*arrays)
    return results


def _dequantize(layout: Layout, *refs: Any) -> None:
    codes, scales, out = refs[: layout.parts], refs[layout.parts : -1], refs[-1]

    def block(part: int, rows: Any, cols: Any, scale: Any) -> None:
        bits = lax.bitcast_convert_type(codes[part][0, rows, cols], jnp.int8).T
        weights = _weights(bits.astype(jnp.int32), scales[part][scale]).astype(jnp.bfloat16)
        out[0, cols, rows] = lax.bitcast_convert_type(weights, out.dtype)

    _blocks(layout, block)


def _quantize(layout: Layout, weights: Any, *refs: Any) -> None:
    given = refs[0].dtype == jnp.float32
    first, second = refs[: layout.parts], refs[layout.parts :]
    scales, codes = (first, second) if given else (second, first)

    def block(part: int, rows: Any, cols: Any, scale: Any) -> None:
        wide = weights[0, cols, rows].astype(jnp.float32)
        if not given:
            scales[part][scale] = scale_of_amax(_amax(wide))
        code = _codes(wide, scales[part][scale]).T.astype(jnp.uint8)
        codes[part][0, rows, cols] = lax.bitcast_convert_type(code, jnp.float8_e4m3fn)

    _blocks(layout, block)


def _weights(codes: jax.Array, scale_inv: jax.Array) -> jax.Array:
    """`decode(codes) * scale_inv` in fewer steps: `codes` are the bits, int32 with the sign extended."""
    magnitude = codes & 0x7F
    size = lax.bitcast_convert_type((magnitude << 20) + np.int32(120 << 23), jnp.float32)
    size = jnp.minimum(size, (size + size) - np.float32(2.0**-6))  # the second is less for exponent 0 alone, and right
    size = jnp.where(magnitude == CODE_NAN, np.float32(np.nan), size)
    sign = codes & np.int32(-(2**31))
    return lax.bitcast_convert_type(lax.bitcast_convert_type(size, jnp.int32) | sign, jnp.float32) * scale_inv


def _codes(wide: jax.Array, scale_inv: jax.Array) -> jax.Array:
    limit = limit_of(scale_inv)
    scale = jnp.full(wide.shape, usable(scale_inv, limit))
    return code_bits(wide, scale, 1 / significand_of(scale), limit)


def _amax(wide: jax.Array) -> jax.Array:
    """The largest magnitude by its bits, which order numbers, infinity and NaN."""
    bits = lax.bitcast_convert_type(bits_of(wide) & 0x7FFFFFFF, jnp.int32)
    return lax.bitcast_convert_type(bits.max(), jnp.float32)


def _blocks(layout: Layout, work: Callable[[int, Any, Any, Any], None]) -> None:
    """Do the blocks that are at hand: `work` gets their part, rows and columns here, and the place of their scale."""
    column, turn, row = (pl.program_id(axis) for axis in (1, 2, 3))
    down, across = (size // SIDE for size in layout.tile)
    at_once = next(blocks for blocks in _TURNS if down * across % blocks == 0)

    def some(part: int, number: jax.Array) -> None:
        for own in range(at_once):
            r, c = (step(number * at_once + own, np.int32(across)) for step in (lax.div, lax.rem))
            rows, cols = (pl.ds(pl.multiple_of(index * SIDE, SIDE), SIDE) for index in (r, c))
            work(part, rows, cols, (0, row * down + r, column * across + c))

    for part in range(layout.parts):
        every = partial(lax.fori_loop, 0, down * across // at_once, partial(_loop, partial(some, part)), None)
        pl.when(turn == part)(every)


def _loop(body: Callable[[jax.Array], None], number: jax.Array, _: None) -> None:
    body(number)


def _array(shape: tuple[int, ...], dtype: Any, like: jax.Array) -> jax.ShapeDtypeStruct:
    """A result that differs between devices as an argument does, which `jax.shard_map` asks for."""
    varying = jax.typeof(like).manual_axis_type
    return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=varying)  # type: ignore[no-untyped-call]


def _layout_of(codes: jax.Array, parts: int) -> Layout:
    experts, rows, cols = codes.shape
    return Layout(experts=experts, parts=parts, rows=rows, cols=cols)


def _held(step: Any, steps: int) -> Any:
    return jnp.clip(step, 0, steps - 1)


def _divisor(size: int, most: int) -> int:
    """The largest number of whole blocks, in elements, that divides `size` and is at most `most`."""
    return max(side for side in range(SIDE, most + 1, SIDE) if size % side == 0)
