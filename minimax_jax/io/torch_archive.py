"""One tensor as `torch.save` writes it: a zip archive, with a pickle that says how the bytes in it are a tensor."""

from __future__ import annotations

import io
import struct
import zipfile
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from minimax_jax.dtypes import DTYPES
from minimax_jax.errors import FormatError, Problem, saying
from minimax_jax.io.files import as_bytes
from minimax_jax.io.inert import Named, read_pickle
from minimax_jax.io.jsonfile import shown
from minimax_jax.io.location import Location
from minimax_jax.io.source import OpenFile

TORCH_DTYPES = {f"torch.{dtype.name}": name for name, dtype in DTYPES.items()}
"""Names of dtypes by what torch calls them."""

_STORAGES = {
    "torch.BFloat16Storage": "BF16",
    "torch.HalfStorage": "F16",
    "torch.FloatStorage": "F32",
    "torch.DoubleStorage": "F64",
    "torch.ComplexFloatStorage": "C64",
    "torch.LongStorage": "I64",
    "torch.IntStorage": "I32",
    "torch.ShortStorage": "I16",
    "torch.CharStorage": "I8",
    "torch.ByteStorage": "U8",
    "torch.BoolStorage": "BOOL",
}
"""The dtype of what lies in a storage; those of newer dtypes are bytes, and the pickle names the dtype beside them."""

_LOCAL_HEADER = struct.Struct("<26xHH")
"""Of a zip entry, lengths of its name and of its further fields, behind which its bytes begin."""

_MOST_SMALL_BYTES = 2**20
_MOST_SPAN_BYTES = 2**22
_GAP_BYTES = 2**18
"""As in `reader`: farther apart, another request costs less time than the bytes between."""
_SHOWN = 80


@dataclass(frozen=True, kw_only=True, slots=True)
class Stored:
    """Where a tensor lies in a file, and how.

    Attributes:
        dtype: by format name.
        shape: sizes of the axes.
        strides: bytes from one element to the next along each axis.
        start: position of the first element in the file.
    """

    dtype: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    start: int

    def fill(self, opened: OpenFile, region: tuple[slice, ...], box: npt.NDArray[Any]) -> None:
        """Read a box of it, a range with start and stop for each axis, into an array of its dtype and shape."""
        start = self.start + sum(part.start * stride for part, stride in zip(region, self.strides, strict=True))
        self._fill(opened, start, box)

    def _fill(self, opened: OpenFile, start: int, box: npt.NDArray[Any]) -> None:
        """Read what begins somewhere; in halves where that is much, or much lies between its elements."""
        if box.flags.c_contiguous and _same_strides(box, self.strides):
            opened.read_into(start, as_bytes(box))
            return
        nbytes = _span_bytes(box.shape, self.strides, box.itemsize)
        if nbytes <= (_MOST_SPAN_BYTES if nbytes <= 2 * box.nbytes else _GAP_BYTES):
            span = np.empty(nbytes, np.uint8)
            opened.read_into(start, span.data)
            box[...] = np.ndarray(box.shape, box.dtype, span, strides=self.strides)
            return
        axis = int(np.argmax([(size - 1) * stride for size, stride in zip(box.shape, self.strides, strict=True)]))
        middle, before = box.shape[axis] // 2, (slice(None),) * axis
        self._fill(opened, start, box[(*before, slice(middle))])
        self._fill(opened, start + middle * self.strides[axis], box[(*before, slice(middle, None))])


def find_tensor(opened: OpenFile, start: int, stop: int, *, file: Location, key: str) -> Stored:
    """Where a tensor lies in the archive of it that fills a part of a file; its elements are not read.

    Args:
        opened: the file.
        start: position of the archive.
        stop: its end.
        file: the file, for messages.
        key: the tensor, likewise.

    Raises:
        FormatError: it is not such an archive, or a damaged one.
    """
    try:
        archive = _Archive(opened, start, stop)
        if archive.read("byteorder", absent=b"little") != b"little":  # torch before 2.1 said nothing of it
            raise ValueError("numbers are not in little-endian order")
        told = read_pickle(archive.read("data.pkl"), file=file, what="description of a tensor")
        return _stored(told, archive)
    except (zipfile.BadZipFile, NotImplementedError, struct.error, KeyError, ValueError) as error:
        what, remedy = "not a tensor as torch.save writes it", "copy the file again, or save the checkpoint anew"
        got = f"{saying(error)}, in bytes {start:,} to {stop:,}"
        raise FormatError(Problem(what=what, file=str(file), key=shown(key), got=got, remedy=remedy)) from error


class _Archive:
    """The files in an archive that lie there as they are, by their names without that of the folder around them."""

    def __init__(self, opened: OpenFile, start: int, stop: int):
        self._opened, self._start, self._stop = opened, start, stop
        with zipfile.ZipFile(_Window(opened, start, stop)) as archive:
            entries = [entry for entry in archive.infolist() if entry.compress_type == zipfile.ZIP_STORED]
        self._entries = {entry.filename.partition("/")[2]: entry for entry in entries}

    def part(self, name: str) -> tuple[int, int]:
        """Where a file begins and ends."""
        entry, header = self._entries[name], bytearray(_LOCAL_HEADER.size)
        self._opened.read_into(self._start + entry.header_offset, memoryview(header))
        start = self._start + entry.header_offset + len(header) + sum(_LOCAL_HEADER.unpack(header))
        if not self._start <= start <= start + entry.file_size <= self._stop:
            raise ValueError(f"{name} is not inside")
        return start, start + entry.file_size

    def read(self, name: str, *, absent: bytes | None = None) -> bytes:
        """A small file, or what stands for it where there is none."""
        if absent is not None and name not in self._entries:
            return absent
        start, stop = self.part(name)
        if stop - start > _MOST_SMALL_BYTES:
            raise ValueError(f"{name} is too long")
        content = bytearray(stop - start)
        self._opened.read_into(start, memoryview(content))
        return bytes(content)


class _Window(io.RawIOBase):
    """A part of a file, as a file for `zipfile`, which asks at once for as much as an archive says."""

    def __init__(self, opened: OpenFile, start: int, stop: int):
        self._opened, self._start, self._nbytes, self._at = opened, start, stop - start, 0

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Go to a position."""
        self._at = max(0, offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._nbytes}[whence])
        return self._at

    def read(self, nbytes: int = -1) -> bytes:
        """Read on."""
        left = max(0, self._nbytes - self._at)
        wanted = left if nbytes < 0 else min(nbytes, left)
        if wanted > _MOST_SMALL_BYTES:
            raise ValueError("list of entries is too long")
        content = bytearray(wanted)
        self._opened.read_into(self._start + self._at, memoryview(content))
        self._at += wanted
        return bytes(content)


def _stored(told: object, archive: _Archive) -> Stored:
    """What the pickle of a tensor says, with where its elements are."""
    match told:
        case Named(
            name="torch._utils._rebuild_tensor_v2" | "torch._utils._rebuild_tensor_v3",
            args=(
                ("storage", Named(name=storage), str(part), _, int(size)),
                int(offset),
                tuple(shape),
                tuple(steps),
                _,
                _,
                *further,
            ),
        ) if len(shape) == len(steps) and all(isinstance(n, int) and n >= 0 for n in (offset, *shape, *steps)):
            dtype, unit_bytes = _dtype(storage, further)
        case _:
            raise ValueError("not the description of a plain tensor")
    start, stop = archive.part(f"data/{part}")
    itemsize = DTYPES[dtype].itemsize
    strides = tuple(step * itemsize for step in steps)
    if stop - start != size * unit_bytes or offset * itemsize + _span_bytes(shape, strides, itemsize) > stop - start:
        raise ValueError("the tensor does not fit what is there of it")
    return Stored(dtype=dtype, shape=shape, strides=strides, start=start + offset * itemsize)


def _dtype(storage: str, further: list[object]) -> tuple[str, int]:
    """The dtype of a tensor by format name, and the bytes of what the size of its storage counts."""
    match storage, further:
        case _, [] if storage in _STORAGES:
            return _STORAGES[storage], DTYPES[_STORAGES[storage]].itemsize
        case "torch.storage.UntypedStorage", [Named(name=dtype)] if dtype in TORCH_DTYPES:
            return TORCH_DTYPES[dtype], 1
    raise ValueError(f"no dtype that is known here: {storage[:_SHOWN]}")


def _same_strides(box: npt.NDArray[Any], strides: tuple[int, ...]) -> bool:
    """Whether elements lie as far apart as those of an array."""
    return all(size < 2 or one == other for size, one, other in zip(box.shape, box.strides, strides, strict=True))


def _span_bytes(shape: tuple[int, ...], strides: tuple[int, ...], itemsize: int) -> int:
    """Bytes from the first element of a tensor to the end of the last."""
    if 0 in shape:
        return 0
    return itemsize + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
