"""Which code does the work: the choice is automatic, and can be asked for. Without jax.

For large concrete arrays on a CPU, MINIMAX_JAX_CPU=xla keeps to XLA, and MINIMAX_JAX_CPU=numba insists on the kernels.
For programs that are compiled for TPUs, MINIMAX_JAX_TPU=xla keeps to XLA; it is read as a program is first lowered.
"""

from __future__ import annotations

import functools
import importlib
import os
import platform
from types import ModuleType
from typing import Literal, TypeAlias

from minimax_jax.errors import LayoutError, Problem

Backend: TypeAlias = Literal["numba", "xla"]

TpuKernels: TypeAlias = Literal["pallas", "xla"]

VARIABLE = "MINIMAX_JAX_CPU"
TPU_VARIABLE = "MINIMAX_JAX_TPU"


def backend() -> Backend:
    """What large concrete arrays on a CPU go through.

    Raises:
        LayoutError: MINIMAX_JAX_CPU asks for something unknown, or for numba where it cannot be used.
    """
    wanted = asked()
    if wanted == "xla":
        return "xla"
    if kernels() is not None:
        return "numba"
    if wanted == "numba":
        remedy = "pip install 'minimax_jax[fast]', let numba compile (no NUMBA_DISABLE_JIT), or unset it"
        raise LayoutError(Problem(what="numba cannot be used here", got=f"{VARIABLE}=numba", remedy=remedy))
    return "xla"


def asked() -> str:
    """What MINIMAX_JAX_CPU says; raises a LayoutError for what is unknown."""
    return _setting(VARIABLE, "numba")


def tpu_kernels() -> TpuKernels:
    """What the grouped codec goes through in programs for TPUs.

    Raises:
        LayoutError: MINIMAX_JAX_TPU asks for something unknown.
    """
    return "xla" if _setting(TPU_VARIABLE, "pallas") == "xla" else "pallas"


def _setting(variable: str, kernels: str) -> str:
    wanted = os.environ.get(variable, "")
    if wanted not in ("", kernels, "xla"):
        raise LayoutError(Problem(what=f"unknown {variable}", expected=f"{kernels}, xla, or not set", got=wanted))
    return wanted


@functools.cache
def kernels() -> ModuleType | None:
    """The kernels; None without numba or where it may not compile, or on a processor that has no float16."""
    try:
        binding = importlib.import_module("llvmlite.binding")
        config = importlib.import_module("numba.core.config")
        features = binding.get_host_cpu_features()
        x86 = platform.machine().lower() in ("x86_64", "amd64", "i386", "i686")
        told = config.DISABLE_JIT or config.CPU_NAME or config.CPU_FEATURES
        if told or (x86 and not features.get("f16c")):
            return None
        return importlib.import_module("minimax_jax.ops.kernels_numba")
    except ImportError:
        return None
