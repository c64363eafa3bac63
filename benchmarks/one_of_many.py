"""One process of a pod loads its share of the full-size checkpoint; the others are there, and only keep it company.

    python benchmarks/one_of_many.py --processes 64

Every process is a real one, of one mesh under `jax.distributed`; the checkpoint has the size and the headers of the
published one and reads as zeros (`synthesize(..., sparse=True)`), so that neither takes a pod or a disk.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
from jax.sharding import AxisType

import minimax_jax as mj
from minimax_jax.synthetic import synthesize
from minimax_jax.synthetic.sizes import REAL

AXES = ("expert", "tensor")
PATIENCE_SECONDS = 1800
BUDGET_BYTES = 512 * 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--processes", type=int, default=64, help="of one device each; a multiple of --tensor")
    parser.add_argument("--tensor", type=int, default=8, help="over how many of them heads and vocabulary are divided")
    parser.add_argument("--company", nargs=2, metavar=("PORT", "PROCESS"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.company:
        port, process = map(int, options.company)
        join(port, options.processes, process)
        sys.stdin.read()  # until process 0 has what it wants
        os._exit(0)
    with tempfile.TemporaryDirectory() as folder:
        synthesize(Path(folder) / "model", REAL, sparse=True)
        print(json.dumps(measure(Path(folder) / "model", options.processes, options.tensor), indent=1), flush=True)
    os._exit(0)  # no barrier with processes that are gone


def join(port: int, processes: int, process: int) -> None:
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(
        f"localhost:{port}", processes, process, initialization_timeout=PATIENCE_SECONDS, heartbeat_timeout_seconds=600
    )
    jax.devices()  # all of them know of each other from here on


def measure(model: Path, processes: int, tensor: int) -> dict[str, object]:
    """What process 0 reads, holds and needs beside that."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    command = [sys.executable, __file__, "--processes", str(processes), "--company", str(port)]
    company = [
        subprocess.Popen([*command, str(n)], stdin=subprocess.PIPE, stderr=subprocess.DEVNULL)
        for n in range(1, processes)
    ]
    try:
        join(port, processes, 0)
        found = share(model, {"expert": processes // tensor, "tensor": tensor})
    finally:
        for process in company:
            process.kill()
    return found


def share(model: Path, axes: dict[str, int]) -> dict[str, object]:
    mesh = jax.make_mesh(tuple(axes.values()), tuple(axes), axis_types=(AxisType.Auto,) * len(axes))
    before_bytes, read_bytes, started = _peak_bytes(), _read_bytes(), time.perf_counter()
    tree = mj.load(model, mesh=mesh, dtype=None, max_memory_bytes=BUDGET_BYTES)
    seconds = time.perf_counter() - started
    shards = [shard.data.nbytes for leaf in jax.tree.leaves(tree) for shard in leaf.addressable_shards]
    return {
        "mesh": axes,
        "devices": jax.device_count(),
        "checkpoint_bytes": sum(file.stat().st_size for file in model.glob("*.safetensors")),
        "read_bytes": _read_bytes() - read_bytes,
        "array_bytes": sum(shards),
        "peak_over_arrays_bytes": _peak_bytes() - before_bytes - sum(shards),
        "budget_bytes": BUDGET_BYTES,
        "seconds": seconds,
    }


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _read_bytes() -> int:
    """What this process has asked the system to read since it began."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("rchar"))


if __name__ == "__main__":
    main()
