"""What the machine can do: streams through memory, a plain single pass over the codes, plain copies of files."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import ml_dtypes
import numba
import numpy as np

from benchmarks.speed.cases import BF16, BLOCK, Array, Case

_PIECE_BYTES = 4 * 2**20
_POOL = ThreadPoolExecutor(2)
_VALUES = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)


def in_two(task: Callable[..., object], *each: Iterable[Any]) -> None:
    """Do tasks on two threads."""
    list(_POOL.map(task, *each))


@numba.njit(nogil=True, cache=True)
def _widen(source: Any, target: Any) -> None:
    for i in range(source.size):
        target[i] = np.uint16(source[i]) << np.uint16(7)


@numba.njit(nogil=True, cache=True)
def _narrow(source: Any, target: Any) -> None:
    for i in range(source.size):
        target[i] = source[i] >> np.uint16(7)


def stream(case: Case, *, widen: bool) -> Callable[[], object]:
    """Reads one byte and writes two for every code of a case, or the other way round; into the same memory each time.

    Pieces go between two threads, as the experts of a layer do. What is read was written before: memory that never was
    is one page of zeros, which stays in the cache.
    """
    count = sum(leaf.size for leaf in case.native.values())
    narrow, wide = np.ones(count, np.uint8), np.ones(count, np.uint16)
    function, source, target = (_widen, narrow, wide) if widen else (_narrow, wide, narrow)
    pieces = max(2, count // _PIECE_BYTES)
    return lambda: in_two(function, np.array_split(source, pieces), np.array_split(target, pieces))


@numba.njit(nogil=True, cache=True, error_model="numpy")
def _single_pass(codes: Any, scales: Any, values: Any, table: Any, target: Any) -> None:
    """A square block after the other: all codes times its scale as a table of bfloat16, then gather and transpose."""
    for row in range(scales.shape[0]):
        for col in range(scales.shape[1]):
            for code in range(256):
                table[code] = values[code] * scales[row, col]
            bits = table.view(np.uint32)
            for code in range(256):
                bits[code] = (bits[code] + np.uint32(0x7FFF) + ((bits[code] >> np.uint32(16)) & np.uint32(1))) >> 16
            for c in range(col * BLOCK, (col + 1) * BLOCK):
                for r in range(row * BLOCK, (row + 1) * BLOCK):
                    target[c, r] = bits[codes[r, c]]


def single_pass(case: Case) -> Callable[[], dict[str, Array]]:
    """Dequantise and group by a short loop over the blocks: what a compiler makes of the plain formulation."""
    out = {name: np.zeros(leaf.shape, np.uint16) for name, leaf in case.native.items()}
    jobs = []
    for entry in case.entries:
        for expert, keys in enumerate(entry.keys):
            for part, key in enumerate(keys):
                rows = case.tree[key].shape[0]
                target = out[entry.native][expert][:, part * rows : (part + 1) * rows]
                jobs.append((case.tree[key].view(np.uint8), case.tree[key + "_scale_inv"], target))

    def run() -> dict[str, Array]:
        in_two(lambda job: _single_pass(job[0], job[1], _VALUES, np.empty(256, np.float32), job[2]), jobs)
        return {name: leaf.view(BF16) for name, leaf in out.items()}

    return run


def copy_files(files: Sequence[Path], folder: Path, *, times: int = 1) -> None:
    """Copy files and flush them, two threads, through buffers that are used again, into files of their full size.

    `times` 2 writes all bytes twice, as a conversion to bfloat16 does.
    """
    folder.mkdir()
    for file in files:
        nbytes = file.stat().st_size
        source, target = os.open(file, os.O_RDONLY), os.open(folder / file.name, os.O_RDWR | os.O_CREAT)
        try:
            os.posix_fallocate(target, 0, times * nbytes)
            halves = ((half * nbytes // 2, (half + 1) * nbytes // 2) for half in range(2))
            in_two(functools.partial(_copy, source, target, times), *zip(*halves, strict=True))
            os.fsync(target)
        finally:
            os.close(source)
            os.close(target)


def _copy(source: int, target: int, times: int, start: int, stop: int) -> None:
    buffer = memoryview(bytearray(_PIECE_BYTES))
    for at in range(start, stop, _PIECE_BYTES):
        piece = buffer[: min(_PIECE_BYTES, stop - at)]
        os.preadv(source, [piece], at)
        for again in range(times):
            os.pwrite(target, piece, times * at + again * len(piece))


def read_files(files: Sequence[Path]) -> None:
    """Read files, through one buffer for each of two threads."""

    def read(file: Path) -> None:
        buffer = memoryview(bytearray(_PIECE_BYTES))
        with file.open("rb", buffering=0) as stream:
            while stream.readinto(buffer):
                pass

    in_two(read, files)


def forget(files: Iterable[Path]) -> None:
    """Drop files from the page cache."""
    for file in files:
        fd = os.open(file, os.O_RDONLY)
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)
