"""The header of a safetensors file: parsed and checked before any byte of data is looked at, and written.

A file is: the length of the header (8 bytes, unsigned, little-endian); the header, one JSON object that maps each key
to its dtype, shape and data_offsets; the data, in which tensors lie without gaps or overlaps.
Source: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import reprlib
import struct
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from operator import attrgetter, itemgetter
from typing import Any, NamedTuple

import numpy as np

from minimax_jax.bulk import without_collector
from minimax_jax.dtypes import DTYPES
from minimax_jax.errors import FormatError, Problem, raise_if
from minimax_jax.io.files import FileState, short_file
from minimax_jax.io.jsonfile import is_text, parse_object, shown
from minimax_jax.io.location import Location
from minimax_jax.io.source import open_file

MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library itself
DATA_ALIGNMENT_BYTES = 64  # jax.device_put takes 64-byte aligned host memory without a copy
METADATA_KEY = "__metadata__"
PREFIX_BYTES = 8
"""The length of the header, before it."""

_MAX_SIZE = 2**63 - 1
_MAX_AXES = 64  # numpy's limit
_ITEM_BYTES = {name: dtype.itemsize for name, dtype in DTYPES.items()}
_MAX_ELEMENTS = _MAX_SIZE // max(_ITEM_BYTES.values())
_LFS_POINTER = b"version "
_fields = itemgetter("dtype", "shape", "data_offsets")
_place = attrgetter("start", "stop")


class TensorInfo(NamedTuple):
    """Where the bytes of one tensor lie.

    A checkpoint has 100,000 of them, and a named tuple is made in a third of the time that a frozen dataclass takes.

    Attributes:
        key: its name in the file.
        dtype: its name in the format, such as `F8_E4M3`; see `dtypes.DTYPES`.
        file: the file that holds it.
        start: position in `file` of its first byte.
        stop: position in `file` behind its last byte.
    """

    key: str
    dtype: str
    shape: tuple[int, ...]
    file: Location
    start: int
    stop: int

    @property
    def nbytes(self) -> int:
        """Size of the data in bytes."""
        return self.stop - self.start

    @property
    def np_dtype(self) -> np.dtype[Any]:
        """The numpy dtype that holds the same bits."""
        return DTYPES[self.dtype]


@dataclass(frozen=True, kw_only=True)
class Header:
    """What one safetensors file says about itself.

    Attributes:
        tensors: key to place, in the order of the data.
        metadata: the free-form text under `__metadata__`.
        file_bytes: size of the whole file.
        state: what the file was when it was read; None for a header that was not read from one.
    """

    file: Location
    tensors: dict[str, TensorInfo]
    metadata: dict[str, str]
    file_bytes: int
    state: FileState | None = None


def read_header(file: Location) -> Header:
    """Read and check the header of one safetensors file; no tensor data is read.

    Raises:
        FormatError: the file cannot be read or breaks the format; all that is wrong with its tensors at once.
    """
    opened = open_file(file)
    try:
        file_bytes = opened.state.nbytes
        prefix = bytearray(min(PREFIX_BYTES, file_bytes))
        opened.read_into(0, memoryview(prefix))
        text = bytearray(_header_length(bytes(prefix), file, file_bytes))
        opened.read_into(PREFIX_BYTES, memoryview(text))
    finally:
        opened.close()
    header = parse_header(bytes(text), file=file, file_bytes=file_bytes)
    return dataclasses.replace(header, state=opened.state)


@without_collector
def parse_header(text: bytes, *, file: Location, file_bytes: int) -> Header:
    """Check the JSON text of a header against the size of its file; the inverse of `serialise_header`.

    Raises:
        FormatError: all that is wrong with it.
    """
    if not text.startswith(b"{"):
        got = reprlib.repr(text[:16])
        raise FormatError(Problem(what="header does not start with '{'", file=str(file), got=got))
    entries = parse_object(text, file=file, what="header")
    metadata = entries.pop(METADATA_KEY, {})
    problems = list(_metadata_problems(metadata, file))
    problems += (_problem(key, fault, file) for key, entry in entries.items() for fault in _entry_faults(entry))
    raise_if(problems, FormatError)
    data_start = PREFIX_BYTES + len(text)
    infos = [_info(key, entry, file, data_start) for key, entry in entries.items()]
    infos.sort(key=_place)
    raise_if(_range_problems(infos, data_start, file, file_bytes), FormatError)
    return Header(file=file, tensors={info.key: info for info in infos}, metadata=metadata, file_bytes=file_bytes)


def serialise_header(tensors: Iterable[tuple[str, str, tuple[int, ...], int]], metadata: Mapping[str, str]) -> bytes:
    """The bytes before the data: length, JSON, and spaces up to the next multiple of 64 bytes.

    Args:
        tensors: key, dtype name, shape and nbytes of each tensor, in the order of the data.
        metadata: free-form text for `__metadata__`, left out when empty.
    """
    entries: dict[str, Any] = {METADATA_KEY: dict(metadata)} if metadata else {}
    start = 0
    for key, dtype, shape, nbytes in tensors:
        entries[key] = {"dtype": dtype, "shape": shape, "data_offsets": (start, start + nbytes)}
        start += nbytes
    text = json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-(PREFIX_BYTES + len(text)) % DATA_ALIGNMENT_BYTES)
    return struct.pack("<Q", len(text)) + text


def is_shape(value: object) -> bool:
    """Whether `value` is a list or tuple of sizes that numpy can hold: 64 axes, and a byte count that fits 63 bits.

    Axes of length 0 are set aside in that count, as in numpy.
    """
    if not isinstance(value, (list, tuple)) or len(value) > _MAX_AXES:
        return False
    elements = 1
    for size in value:
        if type(size) is not int or size < 0:
            return False
        elements *= size or 1
    return elements <= _MAX_ELEMENTS


def _are_offsets(value: object) -> bool:
    if not isinstance(value, list) or len(value) != 2:
        return False
    begin, end = value
    return type(begin) is type(end) is int and 0 <= begin <= end <= _MAX_SIZE


def _header_length(prefix: bytes, file: Location, file_bytes: int) -> int:
    if len(prefix) < PREFIX_BYTES:
        raise FormatError(short_file(file, expected_bytes=PREFIX_BYTES, got_bytes=file_bytes))
    (length,) = struct.unpack("<Q", prefix)
    if prefix == _LFS_POINTER:
        remedy = "fetch the file itself: git lfs pull"
        raise FormatError(Problem(what="Git LFS pointer in place of a safetensors file", file=str(file), remedy=remedy))
    if length == 0:
        what, remedy = "header is empty: the file was never finished", "download or write it again"
        raise FormatError(Problem(what=what, file=str(file), remedy=remedy))
    if length > MAX_HEADER_BYTES:
        what, expected = "header too long: not a safetensors file", f"at most {MAX_HEADER_BYTES:,} bytes"
        got, remedy = f"{length:,} bytes", "give a safetensors file: download this one again, or find what it really is"
        raise FormatError(Problem(what=what, file=str(file), expected=expected, got=got, remedy=remedy))
    if PREFIX_BYTES + length > file_bytes:
        raise FormatError(short_file(file, expected_bytes=PREFIX_BYTES + length, got_bytes=file_bytes))
    return int(length)


def _metadata_problems(metadata: object, file: Location) -> Iterator[Problem]:
    if not isinstance(metadata, dict):
        got = type(metadata).__name__
        yield Problem(what="metadata is not a JSON object", file=str(file), key=METADATA_KEY, got=got)
        return
    for name, value in metadata.items():
        if not is_text(value):
            got = f"{shown(name)}: {reprlib.repr(value)}"
            yield Problem(what="metadata value is not text", file=str(file), key=METADATA_KEY, got=got)


def _entry_faults(entry: Any) -> list[tuple[str, str, object]]:
    """All that is wrong with the JSON value of a tensor, each time: what, expected, got."""
    try:
        dtype, shape, offsets = _fields(entry)
    except (KeyError, TypeError):
        return [("tensor lacks a field", "an object with dtype, shape, data_offsets", entry)]
    found: list[tuple[str, str, object]] = []
    item_bytes = _ITEM_BYTES.get(dtype) if isinstance(dtype, str) else None
    if item_bytes is None:
        found.append(("unsupported dtype", f"one of {', '.join(DTYPES)}", dtype))
    if not is_shape(shape):
        expected = f"at most {_MAX_AXES} non-negative integers, less than 2**63 bytes in all"
        found.append(("impossible shape", expected, shape))
    if not _are_offsets(offsets):
        found.append(("impossible data_offsets", "two integers, 0 <= begin <= end", offsets))
    if item_bytes is not None and not found:
        nbytes, needed = offsets[1] - offsets[0], math.prod(shape) * item_bytes
        if nbytes != needed:
            found.append(("data_offsets do not match dtype and shape", f"{needed:,} bytes", f"{nbytes:,}"))
    return found


def _problem(key: str, fault: tuple[str, str, object], file: Location) -> Problem:
    what, expected, got = fault
    return Problem(what=what, file=str(file), key=shown(key), expected=expected, got=reprlib.repr(got))


def _range_problems(infos: list[TensorInfo], data_start: int, file: Location, file_bytes: int) -> Iterator[Problem]:
    reached = data_start
    for info in infos:
        if info.start != reached:
            what = "data overlaps the tensor before it" if info.start < reached else "gap before the tensor's data"
            expected, got = f"begins at byte {reached:,} of the file", f"begins at byte {info.start:,}"
            yield Problem(what=what, file=str(file), key=shown(info.key), expected=expected, got=got)
        reached = max(reached, info.stop)
    if reached > file_bytes:
        first = next(info.key for info in infos if info.stop > file_bytes)
        yield short_file(file, expected_bytes=reached, got_bytes=file_bytes, key=shown(first))
    if reached < file_bytes:
        expected, got = f"{reached:,} bytes", f"{file_bytes:,} bytes"
        yield Problem(what="bytes behind the last tensor", file=str(file), expected=expected, got=got)


def _info(key: str, entry: dict[str, Any], file: Location, data_start: int) -> TensorInfo:
    dtype, shape, (begin, end) = _fields(entry)
    return TensorInfo(key, sys.intern(dtype), _shared(tuple(shape)), file, data_start + begin, data_start + end)


@functools.lru_cache(maxsize=256)
def _shared(shape: tuple[int, ...]) -> tuple[int, ...]:
    """One tuple for all tensors of a shape: there are few shapes, and many tensors."""
    return shape
