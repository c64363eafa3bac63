"""One process of several that load a checkpoint together; writes as JSON what it holds and what it read.

python load_process.py PORT PROCESSES PROCESS MESH FOLDER      # MESH as JSON: {"expert": 2, "fsdp": 2}
"""

import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import minimax_jax as mj


def main(port, processes, process, axes, folder):
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"localhost:{port}", processes, process)
    mesh = jax.make_mesh(tuple(axes.values()), tuple(axes), axis_types=(AxisType.Auto,) * len(axes))
    mj.load(folder, mesh=mesh, dtype=None)  # imports and the like are read once
    found = {}
    for name, dtype in (("stored", None), ("bfloat16", jnp.bfloat16)):
        before = read_bytes()
        tree = mj.load(folder, mesh=mesh, dtype=dtype)
        found[name] = {"read_bytes": read_bytes() - before, "shards": shards_of(tree)}
    everywhere = NamedSharding(mesh, PartitionSpec())
    gathered = jax.jit(lambda x: x, out_shardings=everywhere)(tree["lm_head.weight"])
    found["gathered"] = np.asarray(gathered).tobytes().hex()
    Path(f"{folder}-{process}.json").write_text(json.dumps(found))
    jax.distributed.shutdown()


def read_bytes():
    """What this process has asked the system to read since it began, headers and all."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("rchar"))


def shards_of(tree):
    """By name, the shards of each array (a BlockScaled is two): place, dtype and bytes."""
    found = {}
    for name, leaf in tree.items():
        scaled = isinstance(leaf, mj.BlockScaled)
        found |= {name: leaf.values, name + " scales": leaf.scale_inv} if scaled else {name: leaf}
    return {name: [_told(shard) for shard in array.addressable_shards] for name, array in found.items()}


def _told(shard):
    place = [(span.start or 0, span.stop) for span in shard.index]
    return place, str(shard.data.dtype), np.asarray(shard.data).tobytes().hex()


if __name__ == "__main__":
    main(*map(int, sys.argv[1:4]), json.loads(sys.argv[4]), sys.argv[5])
