"""What is measured in a process of its own: starting up, planning, peak memory, sharded loads. Prints JSON.

python -m benchmarks.speed.child TASK ARGUMENT...
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

DEVICES = 8
_AGAIN = 4


def call(task: str, *arguments: object) -> dict[str, Any]:
    """Do a task in a new process, and return what it found."""
    environment = os.environ | {"XLA_FLAGS": f"--xla_force_host_platform_device_count={DEVICES}"}
    command = [sys.executable, "-m", "benchmarks.speed.child", task, *map(str, arguments)]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True, cwd=Path(__file__).parents[2])
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def timed(work: Callable[[], object]) -> float:
    """Seconds that `work` takes."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def start() -> dict[str, Any]:
    """Importing the package beside jax, and showing the help."""
    jax_seconds = timed(lambda: __import__("jax"))
    ours = timed(lambda: __import__("minimax_jax").from_hf)  # names resolve on first use
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    command = [sys.executable, "-m", "minimax_jax", "--help"]
    shown = timed(lambda: subprocess.run(command, env=environment, stdout=subprocess.DEVNULL, check=True))
    return {"import jax": jax_seconds, "import minimax_jax after jax": ours, "--help": shown}


def plan(path: str) -> dict[str, Any]:
    """Key map, headers and plan, each for the first time in this process; headers are in the page cache."""
    import minimax_jax as mj
    from minimax_jax.jobs import plan as planning
    from minimax_jax.jobs.front import target
    from minimax_jax.jobs.source import open_source

    config = mj.MiniMaxConfig.from_pretrained(path)
    found: dict[str, Any] = {"key map": timed(lambda: mj.specs(config))}
    opened: list[Any] = []
    found["headers, checked against the key map"] = timed(lambda: opened.append(open_source(path)))
    found["plan"] = timed(lambda: opened.append(planning.plan(opened[0], target("native"))))
    found["all of it"] = sum(found.values())
    found["tensors"] = len(opened[0].checkpoint.tensors)
    found["units"] = len(opened[1].units)
    return found


def pages() -> dict[str, Any]:
    """What the system takes to hand out memory: first, and when it has just been given back."""
    import numpy as np

    def touch() -> None:
        np.empty(2**30, np.uint8)[::4096] = 1

    first, *_, again = (timed(touch) for _ in range(4))
    return {"1 GiB of fresh pages, the first time": first, "1 GiB of fresh pages, just given back": again}


def pieces() -> dict[str, Any]:
    """See `pieces.pieces`."""
    from benchmarks.speed.pieces import pieces

    return dict(pieces())


def convert(path: str, destination: str, to: str, dtype: str) -> dict[str, Any]:
    """Peak memory of a conversion over the imports, and its seconds, the first call of everything included."""
    import jax.numpy as jnp

    import minimax_jax as mj
    from benchmarks.speed.rounds import peak_of
    from minimax_jax.jobs import run  # noqa: F401 - one of the imports

    jnp.zeros(8).block_until_ready()
    began = time.perf_counter()
    peak_bytes = peak_of(lambda: mj.convert(path, destination, to=to, dtype=dtype))
    return {"peak_bytes": peak_bytes, "seconds": time.perf_counter() - began}


def load(path: str, dtype: str, rounds: str) -> dict[str, Any]:
    """Sharded loads over fake devices of this machine, and their memory beside the arrays themselves."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.sharding import AxisType

    import minimax_jax as mj
    from benchmarks.speed.cases import Case, require_same
    from benchmarks.speed.rounds import peak_of

    mesh = jax.make_mesh((4, 2), ("expert", "tensor"), axis_types=(AxisType.Auto,) * 2)
    held: list[Any] = []

    def once() -> None:
        held.clear()
        held.append(jax.block_until_ready(mj.load(path, mesh=mesh, dtype=None if dtype == "fp8" else jnp.bfloat16)))

    peak_bytes = peak_of(once)
    case = Case(Path(path), 0)
    leaves = {entry.native: held[0][entry.native] for entry in case.entries}
    dense = {k: v if dtype == "bf16" else v.dequantize() for k, v in leaves.items()}
    require_same({name: np.asarray(leaf) for name, leaf in dense.items()}, case.native, f"load, {dtype}")
    nbytes = sum(leaf.nbytes for leaf in jax.tree.leaves(held[0]))
    return {"seconds": [timed(once) for _ in range(int(rounds))], "peak_bytes": peak_bytes - nbytes, "bytes": nbytes}


def grow(path: str, destination: str, shard_bytes: str) -> dict[str, Any]:
    """Conversions to native bf16, once all is compiled and imported; see `_grown`."""
    return _grown(path, destination, shard_bytes=int(shard_bytes))


def team(path: str, destination: str) -> dict[str, Any]:
    """This process's part of a conversion that several share."""
    from minimax_jax.jobs.team import distributed_team

    distributed_team()  # they find each other before the clock runs
    return _grown(path, destination, workers=1, distributed=True)


def _grown(path: str, destination: str, **options: Any) -> dict[str, Any]:
    """Seconds of the fastest of several, since whatever else goes on makes them slower, and the highest peak."""
    import minimax_jax as mj
    from benchmarks.speed.rounds import peak_of
    from minimax_jax import synthetic

    with tempfile.TemporaryDirectory() as folder:  # loads the kernels
        synthetic.synthesize(f"{folder}/one", synthetic.config(real=True, layers=1, experts=1, vocab_size=1024))
        mj.convert(f"{folder}/one", f"{folder}/out")
    seconds: list[float] = []
    peaks: list[int] = []
    for place in (destination, *(f"{destination}-{again}" for again in range(_AGAIN))):
        work = functools.partial(mj.convert, path, place, **options)
        peaks.append(peak_of(lambda work=work: seconds.append(timed(work))))
    return {"seconds": min(seconds), "peak_bytes": max(peaks)}


TASKS: dict[str, Callable[..., dict[str, Any]]] = {
    task.__name__: task for task in (start, plan, pages, pieces, convert, load, grow, team)
}

if __name__ == "__main__":
    print(json.dumps(TASKS[sys.argv[1]](*sys.argv[2:])))
