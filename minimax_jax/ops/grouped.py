"""The codec of grouped expert matrices in one step each way: what is bound by memory passes through it once."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike

from minimax_jax.errors import LayoutError, raise_if
from minimax_jax.ops import checks, on_tpu
from minimax_jax.ops.blocks import block_amax
from minimax_jax.ops.checks import Array, Block
from minimax_jax.ops.experts import ungroup
from minimax_jax.ops.fp8 import codes_by, quantize
from minimax_jax.ops.rounding import CODE_NAN, bits_of, scale_of_amax, settle
from minimax_jax.ops.scaled import BlockScaled, arrays_of, dequantize_grouped, group_scaled, of_arrays


def quantize_grouped(
    weights: Array, parts: int, scale_inv: Array | None = None, *, block: Block = (128, 128)
) -> tuple[BlockScaled, ...]:
    """FP8 matrices of grouped weights: `[BlockScaled.quantize(part) for part in ungroup(weights, parts)]`, but cheaper.

    Args:
        weights: float32, bfloat16 or float16 [experts, cols, parts * rows].
        parts: how many matrices of an expert stand side by side.
        scale_inv: scales to use, grouped alike: float32 [experts, block cols, parts * block rows]; or None to derive
            them.
        block: rows and columns of one block of a part.

    Returns:
        One BlockScaled [experts, rows, cols] for each part.

    Raises:
        LayoutError: wrong dtypes, or shapes that do not fit each other.
        NumericError: as from `minimax_jax.ops.fp8.quantize`.
    """
    made: tuple[BlockScaled, ...]
    made, bad = _quantize_grouped(weights, scale_inv, parts=parts, block=block)
    checks.raise_if_bad(bad, weights, scale_inv)
    return made


def put_grouped(shard: jax.Array, parts: Sequence[BlockScaled], start: tuple[Any, ...], dtype: DTypeLike) -> jax.Array:
    """Grouped weights with those of some experts filled in: in place, where `shard` is donated to the program.

    Args:
        shard: their bits, unsigned [..., experts, cols, parts * rows].
        parts: matrices of the experts, as for `dequantize_grouped`.
        start: where they begin, along the leading axes; integers or traced scalars.
        dtype: of the weights, as wide as the bits.

    Returns:
        The bits, shaped as `shard`.
    """
    dtype, rest = np.dtype(dtype), (np.int32(0),) * 2
    _, rows, cols = parts[0].shape
    whole = shard.shape[-2:] == (cols, len(parts) * rows)
    if dtype != jnp.bfloat16 or not whole or not on_tpu.covers(parts[0].shape, parts[0].block, len(parts)):
        portion = bits_of(dequantize_grouped(parts, dtype))
        portion = portion.reshape(*(1 for _ in shard.shape[:-3]), *portion.shape)
        return lax.dynamic_update_slice(shard, portion, (*start, *rest))

    def plain(bits: jax.Array, at: jax.Array, *arrays: jax.Array) -> list[jax.Array]:
        weights = group_scaled(of_arrays(arrays, parts[0].block)).dequantize(dtype)
        return [lax.dynamic_update_slice(bits, bits_of(weights), (at[0], *rest))]

    expert = jnp.int32(0)
    for size, index in zip(shard.shape, start, strict=False):
        expert = expert * size + index
    bits = shard.reshape(-1, *shard.shape[-2:])
    kernel = on_tpu.Kernel(name="dequantize_into", parts=len(parts))
    (filled,) = on_tpu.choose(kernel, plain, bits, expert.reshape(1), *arrays_of(parts))
    return filled.reshape(shard.shape)


@partial(jax.jit, static_argnames=("parts", "block"))
def _quantize_grouped(
    weights: jax.Array, scale_inv: jax.Array | None, *, parts: int, block: Block
) -> tuple[tuple[BlockScaled, ...], jax.Array]:
    shape = ungroup(weights, parts)[0].shape
    given = () if scale_inv is None else ungroup(scale_inv, parts)
    for scales in given or (None,):
        raise_if(checks.weight_problems(ungroup(weights, parts)[0], scales, block, 1), LayoutError)
    plain = partial(_by_formulas, parts=parts, block=block)
    arrays = (weights,) if scale_inv is None else (weights, scale_inv)
    if weights.dtype == jnp.bfloat16 and on_tpu.covers(shape, block, parts):
        made = on_tpu.choose(on_tpu.Kernel(name="quantize_grouped", parts=parts), plain, *arrays)
    else:
        made = plain(*arrays)
    codes, grids = made[:parts], made[parts:] or given
    poisoned = [_is_nan(values).any() for values in codes] if given else [jnp.isnan(scales).any() for scales in grids]
    pairs = zip(codes, grids, strict=True)
    return tuple(BlockScaled(values=v, scale_inv=s, block=block) for v, s in pairs), jnp.stack(poisoned).any()


def _by_formulas(*arrays: jax.Array, parts: int, block: Block) -> list[jax.Array]:
    """Codes of all parts of grouped weights; behind them their scales, unless those are given as well."""
    apart, late = (partial(form, parts=parts, block=block) for form in (_transposed_first, _transposed_last))
    if parts == 1 and arrays[0].shape[2] % 2:
        return apart(*arrays)
    made: list[jax.Array] = lax.platform_dependent(*arrays, cuda=late, rocm=late, default=apart)
    return made


def _transposed_first(weights: jax.Array, *scale_inv: jax.Array, parts: int, block: Block) -> list[jax.Array]:
    given = ungroup(scale_inv[0], parts) if scale_inv else (None,) * parts
    made = [quantize(part, scales, block=block) for part, scales in zip(ungroup(weights, parts), given, strict=True)]
    return [values for values, _ in made] + [scales for _, scales in made if not scale_inv]


def _transposed_last(weights: jax.Array, *scale_inv: jax.Array, parts: int, block: Block) -> list[jax.Array]:
    """Quantise in the grouped orientation and transpose the codes: what fuses on a GPU.

    The detour over [experts * cols, parts, rows] has no transposed form, so that the compiler cannot transpose what
    goes before it, several times over, in place of the codes. A single part is taken for two halves for it.
    """
    weights, turned, pieces = settle(weights), (block[1], block[0]), max(parts, 2)
    experts, cols, rows = weights.shape
    scales = scale_inv[0] if scale_inv else scale_of_amax(block_amax(weights, turned, parts))
    codes = codes_by(weights, scales, turned, parts).reshape(experts * cols, pieces, rows // pieces)
    made = [codes[:, piece].reshape(experts, cols, -1).swapaxes(1, 2) for piece in range(pieces)]
    return (made if parts > 1 else [jnp.concatenate(made, axis=1)]) + list(() if scale_inv else ungroup(scales, parts))


def _is_nan(codes: jax.Array) -> jax.Array:
    return bits_of(codes) & 0x7F == CODE_NAN
