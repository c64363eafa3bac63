"""torch <-> jax <-> numpy on the same memory: DLPack where the dtype crosses, byte views where it does not."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import torch
from torch.distributed.tensor import DTensor

from minimax_jax.dtypes import DTYPES, NAMES
from minimax_jax.errors import LayoutError, Problem

TORCH: Mapping[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "U16": torch.uint16,
    "I16": torch.int16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "F32": torch.float32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F64": torch.float64,
    "C64": torch.complex64,
}
"""torch dtype by safetensors name."""

TORCH_NAMES: Mapping[torch.dtype, str] = {dtype: name for name, dtype in TORCH.items()}
"""safetensors name by torch dtype."""

_BYTES = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Integers that numpy and torch both know, by size: what the other dtypes cross as."""


def to_jax(tensor: torch.Tensor, *, copy: bool | None = None) -> jax.Array:
    """A jax array of a torch tensor, on the same device.

    The array shares the tensor's memory, and keeps it alive; it changes when the tensor is written to. On CPU the
    address must be a multiple of 64, as torch allocates it: other memory (a slice, a mapped file) JAX copies.

    Args:
        tensor: contiguous; 0-d and zero-size are fine.
        copy: False never copies, None only where it must.

    Raises:
        LayoutError: a tensor that cannot cross: not contiguous, a DTensor, on the meta device, of a dtype that this
            JAX narrows (64 bits without `jax_enable_x64`); or with `copy=False`, memory that is not aligned.
    """
    problem = _crossing_problem(tensor)
    if problem is None and copy is False and tensor.device.type == "cpu" and tensor.data_ptr() % 64:
        problem = Problem(what="memory that JAX cannot share", expected="an address that is a multiple of 64")
    if problem is not None:
        raise LayoutError(problem)
    crossed: jax.Array = jax.dlpack.from_dlpack(tensor.detach(), copy=copy)
    return crossed


def to_torch(array: jax.Array | np.ndarray[Any, Any]) -> torch.Tensor:
    """A torch tensor of a jax or numpy array, on the same device and memory, which it keeps alive.

    torch does not know memory that must not be written: whoever writes to the tensor changes the array.

    Args:
        array: a concrete jax array on one device, or a writable numpy array of native byte order.

    Raises:
        LayoutError: an array that cannot cross: deleted, traced, on several devices, read-only, with negative strides,
            or of a dtype that torch lacks.
    """
    problem = _array_problem(array)
    if problem is not None:
        raise LayoutError(problem)
    if isinstance(array, jax.Array):
        return torch.from_dlpack(array)  # type: ignore[attr-defined]
    integers = array.view(np.dtype(f"i{array.itemsize}")) if array.dtype != np.bool_ else array
    return torch.from_numpy(integers).view(TORCH[NAMES[array.dtype]])


def as_numpy(tensor: torch.Tensor) -> np.ndarray[Any, Any]:
    """A numpy view of a CPU tensor of any strides; bfloat16 and FP8 have the dtypes of ml_dtypes.

    Raises:
        LayoutError: a DTensor, a tensor that is not on CPU, or of a dtype that numpy and ml_dtypes lack.
    """
    if isinstance(tensor, DTensor) or tensor.device.type != "cpu" or tensor.dtype not in TORCH_NAMES:
        raise LayoutError(_describe("no numpy view of this tensor", tensor, expected="a plain tensor on CPU"))
    if tensor.dtype in (torch.bool, torch.complex64):
        return tensor.detach().numpy()
    integers: np.ndarray[Any, Any] = tensor.detach().view(_BYTES[tensor.itemsize]).numpy()
    return integers.view(DTYPES[TORCH_NAMES[tensor.dtype]])


def _crossing_problem(tensor: torch.Tensor) -> Problem | None:
    if isinstance(tensor, DTensor):
        return _describe("a DTensor is not one array", tensor, remedy="pass its to_local()")
    if tensor.layout != torch.strided or tensor.device.type == "meta" or tensor.dtype not in TORCH_NAMES:
        return _describe("no such array in JAX", tensor, expected="a strided tensor with memory and a plain dtype")
    if not tensor.is_contiguous() or tensor.is_conj() or tensor.is_neg():
        return _describe("a tensor that is not contiguous", tensor, remedy="pass its contiguous()")
    wide = tensor.itemsize == 8 and tensor.dtype != torch.complex64
    if wide and not jax.config.jax_enable_x64:  # type: ignore[attr-defined]
        return _describe("JAX would narrow this dtype to 32 bits", tensor, remedy="set jax_enable_x64")
    return None


def _array_problem(array: jax.Array | np.ndarray[Any, Any]) -> Problem | None:
    if isinstance(array, jax.core.Tracer):
        return Problem(what="a traced array has no memory", got=str(array.aval))
    if isinstance(array, jax.Array) and array.is_deleted():
        return Problem(what="the array was deleted or donated", got=str(array.aval))
    if isinstance(array, jax.Array) and len(array.sharding.device_set) > 1:
        return Problem(what="an array on several devices", got=str(array.sharding), remedy="pass one of its shards")
    if array.dtype not in NAMES:
        return Problem(what="a dtype that torch lacks", got=str(array.dtype))
    if isinstance(array, np.ndarray) and (not array.flags.writeable or any(stride < 0 for stride in array.strides)):
        got = "read-only" if not array.flags.writeable else f"strides {array.strides}"
        return Problem(what="memory that torch cannot take as it is", got=got, remedy="pass a copy")
    return None


def _describe(what: str, tensor: torch.Tensor, **details: str) -> Problem:
    got = f"{type(tensor).__name__} of {tensor.dtype}, shape {list(tensor.shape)}, on {tensor.device}"
    return Problem(what=what, got=got, **details)
