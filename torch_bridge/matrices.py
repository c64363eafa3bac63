"""One FP8 matrix, plain or a DTensor of any layout: dequantised and quantised where its parts lie."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch.distributed.tensor import Shard

from minimax_jax.ops.checks import grid_shape
from torch_bridge import fp8
from torch_bridge.fp8 import Block
from torch_bridge.mesh import Layout, Region, layout_of, local_of, region_of, whole


def dequantize(weight: torch.Tensor, scale_inv: torch.Tensor, dtype: torch.dtype, *, block: Block) -> torch.Tensor:
    """Weights of FP8 codes; each rank dequantises what it holds.

    Args:
        weight: codes, float8_e4m3fn [rows, cols]; a DTensor may be cut anywhere.
        scale_inv: float32 [block rows, block cols] of the whole matrix. A sharded DTensor is gathered first, by a
            collective of its mesh.
        dtype: float32, bfloat16 or float16.
        block: rows and columns of one block.

    Returns:
        New weights, laid out as `weight` is.

    Raises:
        LayoutError: wrong dtypes, or shapes that do not fit each other.
    """
    layout, scales = layout_of(weight), whole(scale_inv)
    if layout is None:
        return fp8.dequantize(weight, scales, dtype, block=block)
    offset = _offset(region_of(weight), block)
    return layout.wrap(fp8.dequantize(local_of(weight), scales, dtype, block=block, offset=offset), weight.shape)


def quantize(weight: torch.Tensor, *, block: Block) -> tuple[torch.Tensor, torch.Tensor]:
    """FP8 codes and real scales of weights; blocks that ranks share get the same scale as in one piece.

    Args:
        weight: float32, bfloat16 or float16 [rows, cols]; for a sharded DTensor this is a collective of its mesh.
        block: rows and columns of one block.

    Returns:
        New codes, laid out as `weight` is, and the plain scales of the whole matrix, on every rank.

    Raises:
        LayoutError: a wrong dtype or shape.
        NumericError: NaN or infinity in the weight, on any rank.
    """
    layout = layout_of(weight)
    if layout is None:
        return fp8.quantize(weight, block=block)
    offset = _offset(region_of(weight), block)
    scale_inv = fp8.scale_of_amax(_global_amax(layout, local_of(weight), weight.shape, block, offset))
    return layout.wrap(fp8.encode(local_of(weight), scale_inv, block=block, offset=offset), weight.shape), scale_inv


def _global_amax(
    layout: Layout, local: torch.Tensor, shape: torch.Size, block: Block, offset: tuple[int, int]
) -> torch.Tensor:
    amax = torch.zeros(grid_shape(tuple(shape), block), dtype=torch.float32, device=local.device)
    if local.numel():
        mine = fp8.block_amax(local, block=block, offset=offset)
        row, col = offset[0] // block[0], offset[1] // block[1]
        amax[row : row + mine.shape[0], col : col + mine.shape[1]] = mine
    amax = amax.nan_to_num(nan=float("inf"), posinf=float("inf"))  # a maximum over ranks may lose a NaN
    for dim, placement in enumerate(layout.placements):
        if isinstance(placement, Shard) and layout.mesh.shape[dim] > 1 and not local.is_meta:
            dist.all_reduce(amax, dist.ReduceOp.MAX, group=layout.mesh.get_group(dim))
    return amax


def _offset(region: Region, block: Block) -> tuple[int, int]:
    """Row and column of the region's first element; of an empty region, one that needs no block."""
    row, col = (part.start if part else 0 for part in region)
    return row, col
