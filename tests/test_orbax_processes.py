"""An Orbax checkpoint read by two processes, and saved by them, under jax.distributed on this machine."""

import json

import folders
import members
import numpy as np
import pytest

import minimax_jax as mj
from minimax_jax import synthetic
from minimax_jax.jobs.orbax import read, write
from minimax_jax.jobs.source import open_source

MEMBER = """
import json, sys
import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(sys.argv[1], 2, int(sys.argv[2]))
import minimax_jax as mj
from minimax_jax.jobs.orbax import read, save

mesh = jax.make_mesh((4,), ("expert",), axis_types=(AxisType.Auto,))
config = mj.MiniMaxConfig.from_pretrained(sys.argv[3])
split, whole = NamedSharding(mesh, P("expert")), NamedSharding(mesh, P())

def placed(entry):
    own = split if entry.row.grouped else whole
    return mj.BlockScaled.tree_unflatten(((128, 128), 1), (own, own)) if entry.row.scaled else own

native = read(sys.argv[3], shardings={entry.native: placed(entry) for entry in mj.specs(config).entries})
save(native, config, sys.argv[4])
grouped = native["model.layers.0.mlp.experts.gate_and_up_projs"].values
shards = {shard.index[0].start: shard.data.astype("float32").sum().item() for shard in grouped.addressable_shards}
print(json.dumps([len(jax.devices()), len(jax.local_devices()), shards]))
"""


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    synthetic.synthesize(folder / "hf", synthetic.config(layers=1, experts=4))
    write(open_source(folder / "hf"), folder / "orbax", dtype="F8_E4M3")
    return folder


def two(*arguments):
    """What each of two processes says."""
    address, flags = f"127.0.0.1:{members.free_port()}", "--xla_force_host_platform_device_count=2"
    group = [members.start("-c", MEMBER, address, index, *arguments, XLA_FLAGS=flags) for index in range(2)]
    statuses, told = members.finish(group)
    assert statuses == [0, 0], told
    return [json.loads(out.splitlines()[-1]) for out, _ in told]


def test_each_process_reads_its_experts_and_together_they_save(written, tmp_path):
    told = two(written / "orbax", tmp_path / "out")
    config = mj.MiniMaxConfig.from_pretrained(written / "orbax")
    want = mj.from_hf(folders.arrays(written / "hf"), config, dtype=None)
    grouped = np.asarray(want["model.layers.0.mlp.experts.gate_and_up_projs"].values).astype(np.float32)
    for index, (devices, local, shards) in enumerate(told):
        assert (devices, local) == (4, 2)
        assert sorted(map(int, shards)) == [2 * index, 2 * index + 1]
        for expert, total in shards.items():
            assert total == pytest.approx(grouped[int(expert)].sum(), rel=1e-4, abs=1)
    assert folders.described(read(tmp_path / "out")) == folders.described(want)
