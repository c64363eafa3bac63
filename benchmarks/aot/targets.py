"""Machines that only their compilers know here: TPU slices by libtpu, H100 nodes by the CUDA plugin.

Nothing is run on them. A compiled program tells its memory, its collectives and, on TPUs, its traffic.
"""

from __future__ import annotations

import importlib.util
import os
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

INSTALL = "pip install 'minimax_jax[aot]', or `make aot`, which has a folder of its own for it"

H100 = """gpu_device_info { threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
shared_memory_per_core: 233472 threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535 memory_bandwidth: 3352320000000
l2_cache_size: 52428800 clock_rate_ghz: 1.98 device_memory_size: 84978434048 shared_memory_per_block_optin: 232448
cuda_compute_capability { major: 9 minor: 0 } registers_per_core_limit: 65536 registers_per_block_limit: 65536 }
platform_name: "CUDA" dnn_version_info { major: 9 minor: 8 } device_description_str: "NVIDIA H100 80GB HBM3" """
"""What XLA's GPU compiler must know of an H100, as a `GpuTargetConfigProto` in text form."""


@dataclass(frozen=True, kw_only=True)
class Kind:
    """A kind of chip.

    Attributes:
        platform: of jax: `tpu` or `cuda`.
        memory_bytes: of one chip.
        needs: the module that brings its compiler.
    """

    platform: str
    memory_bytes: int
    needs: str


KINDS = {
    "v5e": Kind(platform="tpu", memory_bytes=16 << 30, needs="libtpu"),
    "v5p": Kind(platform="tpu", memory_bytes=95 << 30, needs="libtpu"),
    "v6e": Kind(platform="tpu", memory_bytes=32 << 30, needs="libtpu"),
    "h100": Kind(platform="cuda", memory_bytes=84_978_434_048, needs="jax_plugins.xla_cuda12"),
}


@dataclass(frozen=True, kw_only=True)
class Target:
    """Some chips of one kind.

    Attributes:
        kind: name in `KINDS`.
        topology: as the compiler spells it: `2x4` for a slice, `1x8x1` for a node of eight GPUs.
        chips: how many of them are used; the first ones.
    """

    kind: str
    topology: str
    chips: int

    @property
    def name(self) -> str:
        """For people: `v5e x 8`."""
        return f"{self.kind} x {self.chips}"

    def mesh(self, **axes: int) -> Mesh:
        """The chips as a mesh of automatic axes."""
        chosen = np.array(self._devices()[: self.chips]).reshape(tuple(axes.values()))
        return Mesh(chosen, tuple(axes), axis_types=(AxisType.Auto,) * len(axes))

    def _devices(self) -> list[Any]:
        if KINDS[self.kind].platform == "tpu":
            topology = f"{self.kind}:{self.topology}"
            return list(topologies.get_topology_desc(topology, platform="tpu").devices)
        return list(
            topologies.get_topology_desc("h100", platform="cuda", target_config=H100, topology=self.topology).devices
        )


def prepare() -> None:
    """Set what the compilers read from the environment; before anything asks jax for a device."""
    settings = {"TPU_SKIP_MDS_QUERY": "1", "TPU_ACCELERATOR_TYPE": "v5litepod-8", "TPU_WORKER_HOSTNAMES": "localhost"}
    settings |= {"ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "TF_CPP_MIN_LOG_LEVEL": "3"}
    for name, value in settings.items():
        os.environ.setdefault(name, value)
    jax.config.update("jax_platforms", "cpu")  # type: ignore[no-untyped-call]
    spec = importlib.util.find_spec("nvidia.cuda_nvcc") if importlib.util.find_spec("nvidia") else None
    if spec is not None and spec.submodule_search_locations:
        toolkit = Path(next(iter(spec.submodule_search_locations)))
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_gpu_cuda_data_dir={toolkit}".strip()


def missing(kind: str) -> str | None:
    """What is to be installed before a kind of chip can be compiled for; None if nothing is."""
    top, *_ = needs = KINDS[kind].needs.split(".")
    found = importlib.util.find_spec(top) and importlib.util.find_spec(".".join(needs))
    return None if found else KINDS[kind].needs


def versions() -> dict[str, str]:
    """Versions of what compiles, as far as it is installed."""
    found = {}
    for name in ("jax", "jaxlib", "libtpu", "jax-cuda12-plugin", "nvidia-cuda-nvcc-cu12"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def memory_bytes(target: Target) -> int:
    """Memory of one chip."""
    return KINDS[target.kind].memory_bytes


def shape(array_shape: tuple[int, ...], dtype: Any, sharding: Any) -> jax.ShapeDtypeStruct:
    """An argument that is a shape on a mesh."""
    return jax.ShapeDtypeStruct(array_shape, dtype, sharding=sharding)  # type: ignore[no-untyped-call]


def on(mesh: Mesh, *axes: str | None) -> NamedSharding:
    """How an array is divided: the mesh axis of each of its first axes."""
    return NamedSharding(mesh, PartitionSpec(*axes))  # type: ignore[no-untyped-call]
