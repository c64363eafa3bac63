"""Whether concrete arrays on a CPU go through numba kernels, and the memory that these work on.

XLA's CPU compiler transposes an element at a time; the kernels do the same work, to the same bits, many times faster.
They are taken where they can be (see `minimax_jax.ops.backend`), the arrays are concrete and lie in host memory, and
there is enough to do; with MINIMAX_JAX_CPU=numba, however little that is.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from types import ModuleType
from typing import Any, TypeAlias, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from minimax_jax.ops import workspace
from minimax_jax.ops.backend import VARIABLE as VARIABLE
from minimax_jax.ops.backend import asked, kernels
from minimax_jax.ops.backend import backend as backend
from minimax_jax.ops.checks import Array
from minimax_jax.ops.workspace import HostArray
from minimax_jax.ops.workspace import empty as empty

Place: TypeAlias = Callable[[HostArray], Array]
T = TypeVar("T")

BITS = {np.dtype(jnp.bfloat16): np.uint16, np.dtype(np.float16): np.int16, np.dtype(np.float32): np.uint32}
"""What the kernels see weights as, by their dtype."""

_ENOUGH_BYTES = 2**22
"""Less than this goes through XLA, before numba is even imported."""


def kernels_for(tree: Any) -> ModuleType | None:
    """The kernels, `minimax_jax.ops.kernels_numba`, if they are to be used for the arrays of `tree`; else None."""
    leaves = jax.tree.leaves(tree)
    if not leaves or not all(map(_usable, leaves)) or len(_committed_to(leaves)) > 1:
        return None
    here = workspace.active() is not None or not any(isinstance(leaf, np.ndarray) for leaf in leaves)
    if not here and _default_device().platform != "cpu":
        return None
    if asked() != "numba" and sum(leaf.nbytes for leaf in leaves) < _ENOUGH_BYTES:
        return None
    return kernels() if backend() == "numba" else None


def place_of(tree: Any) -> Place:
    """How results become jax arrays, without a copy: on the device of the arguments, as `jax.jit` has it.

    What lies in a workspace stays as it is: a jax array would not know that its memory is used again.
    """
    if workspace.active() is not None:
        return np.ascontiguousarray
    return functools.partial(jax.device_put, device=next(iter(_committed_to(jax.tree.leaves(tree))), None))


def on_host(leaf: Array) -> HostArray:
    """The same memory as numpy sees it; read-only, so that the kernels are compiled for one kind of array."""
    view: HostArray = np.ascontiguousarray(np.asarray(leaf)).view()
    view.flags.writeable = False
    return view


def bits(array: Array) -> HostArray:
    """A view of weights or codes as the kernels see them."""
    return np.asarray(array).view(BITS.get(array.dtype, np.uint8))


def units(array: Array) -> HostArray:
    """A view of any array as unsigned integers of its size: to be moved, and nothing else."""
    return np.asarray(array).view(np.dtype(f"uint{8 * array.dtype.itemsize}"))


def ordinary(scales: Array) -> bool:
    """Whether products with codes are normal float32 numbers or zero, and no step on the way to them overflows."""
    size = np.abs(np.asarray(scales))
    return bool(np.all((size >= 2.0**-110) & (size <= 2.0**110) | (size == 0)))


def run(tasks: Iterable[Callable[[], T]]) -> list[T]:
    """Results of all tasks, as many at a time as there are cores: the kernels let other threads run.

    Who has a workspace has its own threads: there, one task after the other.
    """
    if workspace.active() is not None:
        return [task() for task in tasks]
    todo = list(tasks)
    with ThreadPoolExecutor(max(1, min(len(todo), _cores())), thread_name_prefix="kernel") as pool:
        return [future.result() for future in [pool.submit(task) for task in todo]]


def _usable(leaf: Any) -> bool:
    if not isinstance(leaf, np.ndarray | jax.Array) or isinstance(leaf, jax.core.Tracer) or not leaf.size:
        return False
    if leaf.dtype.itemsize > 4 or not leaf.dtype.isnative:  # of 8 bytes jax makes 4
        return False
    return isinstance(leaf, np.ndarray) or (
        leaf.is_fully_addressable and {device.platform for device in leaf.devices()} == {"cpu"}
    )


def _committed_to(leaves: Iterable[Any]) -> set[jax.Device]:
    committed = [leaf.devices() for leaf in leaves if isinstance(leaf, jax.Array) and leaf.committed]
    return set().union(*committed)


def _default_device() -> jax.Device:
    device = jax.config.jax_default_device  # type: ignore[attr-defined]
    return jax.devices(device)[0] if isinstance(device, str) else device or jax.devices()[0]


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
