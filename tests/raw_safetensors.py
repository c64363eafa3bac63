"""Safetensors files put together by hand, right or wrong, and read, without the code under test."""

import json
import math
import struct
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import safetensors
import torch


def entry(dtype: str, shape: Any, begin: Any, end: Any) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def raw_bytes(header: object, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def library_reads(content: bytes) -> dict[str, tuple[str, list[int], bytes]]:
    """Key to dtype, shape and bytes, as the safetensors library finds them."""
    found = safetensors.deserialize(content)  # type: ignore[no-untyped-call]
    return {key: (info["dtype"], info["shape"], bytes(info["data"])) for key, info in found}


def library_accepts(content: bytes) -> bool:
    try:
        library_reads(content)
    except safetensors.SafetensorError:
        return False
    return True


def write_file(file: Path, **shapes: tuple[int, ...]) -> Path:
    """A valid file of U8 tensors, all bytes of a tensor being its number in the file."""
    header, data = {}, b""
    for number, (key, shape) in enumerate(shapes.items()):
        size = math.prod(shape)
        header[key] = entry("U8", list(shape), len(data), len(data) + size)
        data += bytes([number]) * size
    file.write_bytes(raw_bytes(header, data))
    return file


def write_index(folder: Path, weight_map: object) -> Path:
    file = folder / "model.safetensors.index.json"
    file.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
    return file


def bits(values: npt.NDArray[Any] | torch.Tensor) -> bytes:
    if isinstance(values, torch.Tensor):
        return values.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return values.tobytes()


def random_bits(dtype: torch.dtype, shape: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    """A tensor whose bytes take every value, NaN and subnormals included (0 and 1 for bool)."""
    count = int(np.prod(shape)) * dtype.itemsize
    if not count:
        return torch.zeros(shape, dtype=dtype)
    codes = np.random.default_rng(seed).permutation(np.arange(count, dtype=np.uint32)).astype(np.uint8)
    return torch.from_numpy(codes % 2 if dtype == torch.bool else codes).view(dtype).reshape(shape)
