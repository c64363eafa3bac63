"""Safetensors files read and written without the code under test, right or wrong."""

from __future__ import annotations

import json
import struct
from pathlib import Path

Tensors = dict[str, tuple[str, list[int], bytes]]
"""Key to dtype, shape and bytes."""


def read(file: Path) -> Tensors:
    """The tensors of a safetensors file."""
    content = file.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header, data = json.loads(content[8 : 8 + length]), content[8 + length :]
    header.pop("__metadata__", None)
    return {
        key: (one["dtype"], one["shape"], data[one["data_offsets"][0] : one["data_offsets"][1]])
        for key, one in header.items()
    }


def write(file: Path, tensors: Tensors) -> None:
    """Write a safetensors file."""
    header, start = {}, 0
    for key, (dtype, shape, data) in tensors.items():
        header[key] = {"dtype": dtype, "shape": shape, "data_offsets": [start, start + len(data)]}
        start += len(data)
    write_raw(file, json.dumps(header).encode(), b"".join(data for _, _, data in tensors.values()))


def write_raw(file: Path, header: bytes, data: bytes = b"", length: int | None = None) -> None:
    """Write a file with any header and any length of it."""
    file.write_bytes(struct.pack("<Q", len(header) if length is None else length) + header + data)
