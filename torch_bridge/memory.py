"""A word with the system about the memory of tensors: before they are filled, and when they have been let go of."""

from __future__ import annotations

import ctypes
import functools
import mmap
import sys
import threading
from collections.abc import Sequence

import torch

_OFTEN_ENOUGH_BYTES = 8 << 20
"""Memory is not given back for less: each time costs a walk through the heap."""

_WORTH_BYTES = 4 << 20
"""Below this huge pages are not worth a call; numpy draws the line at the same size."""


def empty(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """`torch.empty`; on CPU, of huge pages where Linux gives them on request, as numpy asks for.

    By pages of 4 KiB, the system takes longer to hand out a fresh tensor than the kernels to fill it.
    """
    out = torch.empty(shape, dtype=dtype, device=device)
    real = type(out) is torch.Tensor and out.device.type == "cpu"  # a fake tensor has no memory
    if real and out.nbytes >= _WORTH_BYTES and sys.platform == "linux":
        first = -(-out.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
        size = (out.data_ptr() + out.nbytes - first) // mmap.PAGESIZE * mmap.PAGESIZE
        ctypes.CDLL(None).madvise(ctypes.c_void_p(first), ctypes.c_size_t(size), mmap.MADV_HUGEPAGE)  # may be declined
    return out


class Heap:
    """The heap while tensors are let go of: what they leave is given back before much of it has gathered.

    What counts is what glibc itself says is free, beyond what was free at first. Tensors that are maps of a file, or
    that somebody else still holds, leave nothing; what other work left behind stays, to be used again. glibc before
    2.33 does not say: there, whatever was let go of counts. May be called from several threads.
    """

    def __init__(self, size_bytes: int):
        """Begin to watch, for work on a result of `size_bytes`: a 32nd of it, or 8 MiB, may gather."""
        self._most_bytes = max(_OFTEN_ENOUGH_BYTES, size_bytes // 32)
        self._lock = threading.Lock()
        self._known_bytes = free_bytes()
        self._let_go_bytes = 0

    def let_go(self, nbytes: int) -> None:
        """Tensors of `nbytes` have been let go of."""
        with self._lock:
            self._let_go_bytes += nbytes
            if self._gathered_bytes() > self._most_bytes:
                self._give_back()

    def close(self) -> None:
        """The work is done: whatever it left is given back."""
        with self._lock:
            if self._gathered_bytes() > 0:
                self._give_back()

    def _gathered_bytes(self) -> int:
        if not counts_free():
            return self._let_go_bytes
        now_bytes = free_bytes()
        self._known_bytes = min(self._known_bytes, now_bytes)  # some of it has been taken into use again
        return now_bytes - self._known_bytes

    def _give_back(self) -> None:
        return_freed()
        self._known_bytes, self._let_go_bytes = free_bytes(), 0


def return_freed() -> None:
    """Give freed memory back to the system; by itself, glibc keeps what tensors of a few MiB leave behind."""
    libc = _libc()
    if libc is not None:
        libc.malloc_trim(ctypes.c_size_t(0))


def free_bytes() -> int:
    """Bytes of the heap that are free, given back already or not; 0 where it is not that of glibc 2.33 or newer."""
    libc = _libc()
    return int(libc.mallinfo2().fordblks) if counts_free() and libc is not None else 0


def counts_free() -> bool:
    """Whether `free_bytes` knows."""
    return hasattr(_libc(), "mallinfo2")


class _Mallinfo2(ctypes.Structure):
    """What `mallinfo2` returns, as malloc.h has it."""

    _fields_ = [
        *((name, ctypes.c_size_t) for name in ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks")),
        *((name, ctypes.c_size_t) for name in ("uordblks", "fordblks", "keepcost")),
    ]


@functools.cache
def _libc() -> ctypes.CDLL | None:
    """The C library, if it is glibc."""
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if libc is None or not hasattr(libc, "malloc_trim"):
        return None
    if hasattr(libc, "mallinfo2"):  # glibc 2.33
        libc.mallinfo2.restype = _Mallinfo2
    return libc
