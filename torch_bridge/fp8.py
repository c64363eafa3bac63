"""Block-scaled FP8 in torch: the maths and the bits of `minimax_jax.ops.fp8`, on any device, for any slice.

CPU tensors go through the jitted kernels; others stay in torch, where whole runs of blocks are one operation: at most
a partial block, whole blocks and another partial block along an axis, wherever a shard begins.

torch does not flush denormals, XLA does: the bits are the same where every weight, scale and product is zero or a
normal float32. A NaN is a NaN in both, of bits unspecified.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, cast

import jax
import torch

from minimax_jax.dtypes import DTYPES
from minimax_jax.errors import LayoutError, NumericError, Problem, raise_if
from minimax_jax.ops import checks
from minimax_jax.ops import fp8 as kernels
from torch_bridge.arrays import TORCH_NAMES, to_jax, to_torch
from torch_bridge.kernels import decoded

FP8 = torch.float8_e4m3fn
BLOCK = (128, 128)

Block = tuple[int, int]
Offset = tuple[int, int]


def dequantize(
    values: torch.Tensor,
    scale_inv: torch.Tensor,
    dtype: torch.dtype = torch.bfloat16,
    *,
    block: Block = BLOCK,
    offset: Offset | None = None,
) -> torch.Tensor:
    """Weights of FP8 codes, or of any slice of them: `dtype(float32(code) * scale)`.

    Args:
        values: codes, float8_e4m3fn [rows, cols], of any strides.
        scale_inv: float32 [block rows, block cols]: of `values` or, with `offset`, of a larger matrix; moved to the
            device of `values`.
        dtype: float32, bfloat16 or float16.
        block: rows and columns of one block.
        offset: row and column of `values[0, 0]` in the matrix that `scale_inv` describes.

    Returns:
        The weights, `dtype` [rows, cols], on the device of `values`; a copy.

    Raises:
        LayoutError: wrong dtypes, or shapes that do not fit each other.
    """
    problems = checks.scaled_problems(_abstract(values), _abstract(scale_inv), block, 1, offset)
    raise_if(problems, LayoutError)
    scale_inv = scale_inv.to(values.device)
    if not on_cpu(values):
        return dequantize_torch(values, scale_inv, dtype, block=block, offset=offset or (0, 0))
    values = values.contiguous()
    weights = decoded(values, scale_inv, dtype, block, offset or (0, 0))
    if weights is not None:
        return weights
    codes, scales = to_jax(values), to_jax(scale_inv.contiguous())
    return to_torch(kernels.dequantize(codes, scales, DTYPES[TORCH_NAMES[dtype]], block=block, offset=offset))


def quantize(x: torch.Tensor, *, block: Block = BLOCK) -> tuple[torch.Tensor, torch.Tensor]:
    """FP8 codes and real scales (amax / 448) of weights.

    Args:
        x: weights, float32, bfloat16 or float16 [rows, cols], of any strides.
        block: rows and columns of one block.

    Returns:
        Codes, float8_e4m3fn [rows, cols], and scales, float32 [block rows, block cols], on the device of `x`; new.

    Raises:
        LayoutError: a wrong dtype or shape.
        NumericError: NaN or infinity in `x`.
    """
    raise_if(checks.weight_problems(_abstract(x), None, block, 1), LayoutError)
    if on_cpu(x):
        values, scales = kernels.quantize(to_jax(x.contiguous()), block=block)
        return to_torch(values), to_torch(scales)
    scale_inv = scale_of_amax(block_amax(x, block=block))
    return encode(x, scale_inv, block=block), scale_inv


def on_cpu(*tensors: torch.Tensor) -> bool:
    """Whether all are on CPU, where the jitted kernels do the work."""
    return all(tensor.device.type == "cpu" for tensor in tensors)


def dequantize_torch(
    values: torch.Tensor, scale_inv: torch.Tensor, dtype: torch.dtype, *, block: Block = BLOCK, offset: Offset = (0, 0)
) -> torch.Tensor:
    """`dequantize` in torch operations alone, on any device; nothing is checked."""
    out = torch.empty(values.shape, dtype=dtype, device=values.device)
    columns = _spread_columns(scale_inv, values.shape[1], block[1], offset[1])
    for run in _runs(values.shape[0], block[0], offset[0]):
        wide = _widen(values[run.rows])
        run.split(wide).mul_(columns[run.blocks, None, :])
        out[run.rows] = wide
    return out


def block_amax(x: torch.Tensor, *, block: Block = BLOCK, offset: Offset = (0, 0)) -> torch.Tensor:
    """Largest magnitude of each block that the slice `x` [rows, cols] at `offset` touches, float32; NaN propagates."""
    size = _amax(x.abs(), block[0], offset[0])
    return _amax(size.T, block[1], offset[1]).T.to(torch.float32).contiguous()


def scale_of_amax(amax: torch.Tensor) -> torch.Tensor:
    """Scales of blocks: `amax / 448`, or 1.0 where that is zero or denormal.

    Raises:
        NumericError: an amax that is NaN or infinite.
    """
    if amax.device.type != "meta" and not bool(amax.isfinite().all()):
        raise NumericError(Problem(what="NaN or infinity in a weight to be quantised"))
    # By a tensor: on CUDA, torch divides by a number as a product with its reciprocal, which is not the IEEE quotient.
    scale = amax / torch.full_like(amax, kernels.FP8_MAX)
    return scale.where(scale >= torch.finfo(torch.float32).tiny, torch.ones_like(scale))


def encode(x: torch.Tensor, scale_inv: torch.Tensor, *, block: Block = BLOCK, offset: Offset = (0, 0)) -> torch.Tensor:
    """FP8 codes of the slice `x` [rows, cols] at `offset` of a matrix with the scales `scale_inv`."""
    out = torch.empty(x.shape, dtype=FP8, device=x.device)
    columns = _spread_columns(scale_inv, x.shape[1], block[1], offset[1])
    for run in _runs(x.shape[0], block[0], offset[0]):
        wide = _widen(x[run.rows])
        run.split(wide).div_(columns[run.blocks, None, :])
        # torch's own cast saturates in some versions, and gives NaN in others.
        out[run.rows] = wide.clamp_(-kernels.FP8_MAX, kernels.FP8_MAX)
    return out


class _Run(NamedTuple):
    """Rows `start` to `stop` in `pieces` equal pieces, each within a block of its own, from block `first` on."""

    start: int
    stop: int
    pieces: int
    first: int

    @property
    def rows(self) -> slice:
        return slice(self.start, self.stop)

    @property
    def blocks(self) -> slice:
        return slice(self.first, self.first + self.pieces)

    def split(self, x: torch.Tensor) -> torch.Tensor:
        """`x` [rows, cols] as a view [pieces, rows of a piece, cols]."""
        return x.view(self.pieces, len(x) // self.pieces, x.shape[1])


def _runs(size: int, block: int, offset: int) -> Iterator[_Run]:
    """At most three: the rest of a block that began before the slice, whole blocks, the beginning of a last one."""
    first, skip = divmod(offset, block)
    start = min(-skip % block, size)
    if start:
        yield _Run(0, start, 1, first)
        first += 1
    count, rest = divmod(size - start, block)
    if count:
        yield _Run(start, size - rest, count, first)
    if rest:
        yield _Run(size - rest, size, 1, first + count)


def _amax(size: torch.Tensor, block: int, offset: int) -> torch.Tensor:
    """Maxima over the blocks of rows of `size` [rows, cols]: [blocks, cols]."""
    runs = [run.split(size[run.rows]).amax(1) for run in _runs(len(size), block, offset)]
    return torch.cat(runs) if runs else size[:0]


def _spread_columns(grid: torch.Tensor, cols: int, block: int, offset: int) -> torch.Tensor:
    """Scales `[block rows, block cols]` repeated along columns alone, of that `cols` from `offset` on."""
    first, skip = divmod(offset, block)
    last = -(-(offset + cols) // block)
    return grid[:, first:last].repeat_interleave(block, dim=1)[:, skip : skip + cols]


def _widen(x: torch.Tensor) -> torch.Tensor:
    return x.to(torch.float32, copy=True, memory_format=torch.contiguous_format)


def _abstract(tensor: torch.Tensor) -> checks.Array:
    """Shape and dtype for the checks that the kernels share."""
    name = TORCH_NAMES.get(tensor.dtype)
    if name is None:
        raise LayoutError(Problem(what="unsupported dtype", got=str(tensor.dtype)))
    struct = jax.ShapeDtypeStruct(tuple(tensor.shape), DTYPES[name])  # type: ignore[no-untyped-call]
    return cast(checks.Array, struct)
