"""BlockScaled: an array that stays in FP8, codes and scales together, as one node of a pytree."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import GetAttrKey
from jax.typing import DTypeLike

from minimax_jax.display import Displayed, size, table_of
from minimax_jax.errors import LayoutError, Problem, raise_if
from minimax_jax.ops import fp8, on_tpu
from minimax_jax.ops.checks import Array, Block, scaled_problems
from minimax_jax.ops.experts import group, ungroup


@jax.tree_util.register_pytree_with_keys_class
@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class BlockScaled(Displayed):
    """Weights as FP8 codes with one scale for each block; see `minimax_jax.ops.fp8` for what they mean.

    A pytree node of two leaves. Building one checks that the grid fits; rebuilding one from leaves does not, so that
    trees of shardings, names or anything else may take the same form.

    Attributes:
        values: codes, float8_e4m3fn [..., rows, cols].
        scale_inv: float32 [..., block rows, block cols].
        block: rows and columns of one block.
        parts: equal parts of the last axis, each with its own grid of blocks.

    Raises:
        LayoutError: wrong dtypes, or a grid that does not fit the codes.

    Examples:
        >>> weights = mj.BlockScaled.quantize(jnp.ones((256, 384)))
        >>> weights
        BlockScaled(float8_e4m3fn[256, 384], scale_inv=float32[2, 3], block=(128, 128))
        >>> weights.dequantize().dtype
        dtype(bfloat16)
    """

    values: Array
    scale_inv: Array
    block: Block = (128, 128)
    parts: int = 1

    def __post_init__(self) -> None:
        raise_if(scaled_problems(self.values, self.scale_inv, self.block, self.parts), LayoutError)

    @classmethod
    def quantize(
        cls, x: Array, scale_inv: Array | None = None, *, block: Block = (128, 128), parts: int = 1
    ) -> BlockScaled:
        """Quantise weights; arguments and errors as in `minimax_jax.ops.fp8.quantize`."""
        values, scales = fp8.quantize(x, scale_inv, block=block, parts=parts)
        return cls(values=values, scale_inv=scales, block=block, parts=parts)

    def dequantize(self, dtype: DTypeLike = jnp.bfloat16) -> jax.Array:
        """The weights, `dtype` [..., rows, cols]; a copy."""
        return fp8.dequantize(self.values, self.scale_inv, dtype, block=self.block, parts=self.parts)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weights: [..., rows, cols]."""
        return self.values.shape

    @property
    def ndim(self) -> int:
        """Number of axes of the weights."""
        return len(self.values.shape)

    @property
    def dtype(self) -> np.dtype[Any]:
        """Dtype of the codes."""
        return self.values.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales."""
        return sum(leaf.size * leaf.dtype.itemsize for leaf in (self.values, self.scale_inv))

    def __repr__(self) -> str:
        parts = "" if self.parts == 1 else f", parts={self.parts}"
        return f"BlockScaled({_short(self.values)}, scale_inv={_short(self.scale_inv)}, block={self.block}{parts})"

    def views(self) -> Iterable[Any]:
        """What there is to look at: of the two arrays, never their numbers."""
        yield repr(self)
        table = table_of("array", "shape", "dtype", "size")
        for name in ("values", "scale_inv"):
            leaf = getattr(self, name)
            if hasattr(leaf, "shape") and hasattr(leaf, "dtype"):
                nbytes = math.prod(leaf.shape) * leaf.dtype.itemsize
                table.add_row(name, str(list(leaf.shape)), str(leaf.dtype), size(nbytes))
        yield table

    def tree_flatten_with_keys(self) -> tuple[tuple[tuple[GetAttrKey, Any], ...], tuple[Block, int]]:
        """Leaves with their names, and what is static."""
        leaves = tuple((GetAttrKey(name), getattr(self, name)) for name in ("values", "scale_inv"))
        return leaves, (self.block, self.parts)

    def tree_flatten(self) -> tuple[tuple[Any, Any], tuple[Block, int]]:
        """Leaves, and what is static."""
        return (self.values, self.scale_inv), (self.block, self.parts)

    @classmethod
    def tree_unflatten(cls, static: tuple[Block, int], leaves: Sequence[Any]) -> BlockScaled:
        """A node of any two leaves, unchecked."""
        node = object.__new__(cls)
        fields = ("values", "scale_inv", "block", "parts")
        for name, value in zip(fields, (*leaves, *static), strict=True):
            object.__setattr__(node, name, value)  # frozen: past __init__, which would check
        return node


def group_scaled(parts: Sequence[BlockScaled]) -> BlockScaled:
    """Group expert matrices as they are, in FP8: the codes of `group`, with their scales carried along.

    Args:
        parts: each [experts, rows, cols], of one shape and block size.

    Returns:
        [experts, cols, parts * rows] with `parts` grids side by side and the block transposed. No number is changed.

    Raises:
        LayoutError: no parts, or parts that differ in shape or block size, or are grouped already.
    """
    raise_if(_group_problems(parts), LayoutError)
    return BlockScaled(
        values=group([part.values for part in parts]),
        scale_inv=group([part.scale_inv for part in parts]),
        block=(parts[0].block[1], parts[0].block[0]),
        parts=len(parts),
    )


def ungroup_scaled(grouped: BlockScaled) -> tuple[BlockScaled, ...]:
    """The inverse of `group_scaled`.

    Args:
        grouped: [experts, cols, parts * rows].

    Returns:
        One BlockScaled [experts, rows, cols] for each part. No number is changed.

    Raises:
        LayoutError: `grouped` does not have three axes.
    """
    values, scales = ungroup(grouped.values, grouped.parts), ungroup(grouped.scale_inv, grouped.parts)
    block = (grouped.block[1], grouped.block[0])
    return tuple(BlockScaled(values=v, scale_inv=s, block=block) for v, s in zip(values, scales, strict=True))


def dequantize_grouped(parts: Sequence[BlockScaled], dtype: DTypeLike = jnp.bfloat16) -> jax.Array:
    """Weights of expert matrices, grouped: `group([part.dequantize(dtype) for part in parts])`, but cheaper.

    The codes are joined, at one byte each, and nothing wider than they are is written before the result.

    Args:
        parts: each [experts, rows, cols], of one shape and block size.
        dtype: float32, bfloat16 or float16.

    Returns:
        `dtype` [experts, cols, parts * rows]; a copy.

    Raises:
        LayoutError: as from `group_scaled`.
    """
    raise_if(_group_problems(parts), LayoutError)
    weights: jax.Array = _dequantize_grouped(tuple(parts), np.dtype(dtype))
    return weights


@partial(jax.jit, static_argnames="dtype")
def _dequantize_grouped(parts: tuple[BlockScaled, ...], dtype: np.dtype[Any]) -> jax.Array:
    block = parts[0].block

    def plain(*arrays: jax.Array) -> list[jax.Array]:
        return [group_scaled(of_arrays(arrays, block)).dequantize(dtype)]

    if dtype != jnp.bfloat16 or not on_tpu.covers(parts[0].shape, block, len(parts)):
        return plain(*arrays_of(parts))[0]
    kernel = on_tpu.Kernel(name="dequantize_grouped", parts=len(parts))
    return on_tpu.choose(kernel, plain, *arrays_of(parts))[0]


def arrays_of(parts: Sequence[BlockScaled]) -> tuple[jax.Array, ...]:
    """The codes of all parts, and behind them their scales."""
    arrays = [part.values for part in parts] + [part.scale_inv for part in parts]
    return tuple(jnp.asarray(array) for array in arrays)


def of_arrays(arrays: Sequence[jax.Array], block: Block) -> list[BlockScaled]:
    """The inverse of `arrays_of`."""
    half = len(arrays) // 2
    pairs = zip(arrays[:half], arrays[half:], strict=True)
    return [BlockScaled(values=values, scale_inv=scales, block=block) for values, scales in pairs]


def _group_problems(parts: Sequence[BlockScaled]) -> list[Problem]:
    if not parts:
        return [Problem(what="nothing to group")]
    got = ", ".join(map(repr, parts))
    if any(part.ndim != 3 or part.parts != 1 for part in parts):
        return [Problem(what="not the matrices of experts", expected="shape [experts, rows, cols], parts=1", got=got)]
    if len({(part.shape, part.block) for part in parts}) > 1:
        return [Problem(what="parts that do not go side by side", expected="one shape and block size", got=got)]
    return []


def _short(leaf: Any) -> str:
    shape, dtype = getattr(leaf, "shape", None), getattr(leaf, "dtype", None)
    return repr(leaf) if shape is None or dtype is None else f"{dtype}{list(shape)}"
