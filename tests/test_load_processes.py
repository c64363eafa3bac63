"""Several real processes load one checkpoint together."""

import json
from pathlib import Path

import jax.numpy as jnp
import members
import numpy as np
import pytest

import minimax_jax as mj
from minimax_jax.synthetic import config, synthesize

PROGRAM = Path(__file__).parent / "load_process.py"
CONFIG = config(layers=1, experts=16, hidden_size=512, intermediate_size=256, head_dim=128, num_attention_heads=4)
"""6 MB of experts, 1 MB of all else: headers, which every process reads whole, are below 1 %."""

CASES = {
    "2 processes, experts": (2, 2, {"expert": 4}),
    "2 processes, experts and hidden": (2, 1, {"expert": 1, "fsdp": 2}),
    "4 processes, all axes": (4, 2, {"expert": 2, "tensor": 2, "fsdp": 2}),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("processes") / "model"
    synthesize(path, CONFIG)
    return path


@pytest.fixture(scope="module", params=CASES)
def loaded(request, folder):
    """What each process of a case says that it has, and has read."""
    processes, devices, axes = CASES[request.param]
    common = (PROGRAM, members.free_port(), processes)
    environment = {"OMP_NUM_THREADS": "1", "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}
    group = [members.start(*common, number, json.dumps(axes), folder, **environment) for number in range(processes)]
    statuses, said = members.finish(group)
    assert statuses == [0] * processes, said
    return [json.loads(Path(f"{folder}-{number}.json").read_text()) for number in range(processes)]


def whole(folder, dtype):
    """Every array of an unsharded conversion, by the names that the processes give."""
    found = {}
    for name, leaf in mj.from_hf(mj.read_tree(folder), CONFIG, dtype=dtype).items():
        scaled = isinstance(leaf, mj.BlockScaled)
        found |= {name: leaf.values, name + " scales": leaf.scale_inv} if scaled else {name: leaf}
    return {name: np.asarray(array) for name, array in found.items()}


def distinct(shards):
    """The shards of one process, copies left out, by array and place."""
    return {(name, str(place)): data for name, own in shards.items() for place, _, data in own}


@pytest.mark.parametrize("dtype", [None, jnp.bfloat16], ids=["stored", "bfloat16"])
def test_the_values_are_those_of_one_process(loaded, folder, dtype):
    name_of = "stored" if dtype is None else "bfloat16"
    want = whole(folder, dtype)
    covered = {name: np.zeros(array.shape, bool) for name, array in want.items()}
    for one in loaded:
        assert one[name_of]["shards"].keys() == want.keys()
        for name, shards in one[name_of]["shards"].items():
            for place, kind, data in shards:
                spans = zip(place, want[name].shape, strict=True)
                index = tuple(slice(start, size if stop is None else stop) for (start, stop), size in spans)
                assert kind == str(want[name].dtype)
                assert bytes.fromhex(data) == want[name][index].tobytes()
                covered[name][index] = True
    assert all(cover.all() for cover in covered.values())
    assert {one["gathered"] for one in loaded} == {want["lm_head.weight"].tobytes().hex()}


@pytest.mark.parametrize("form", ["stored", "bfloat16"])
def test_each_process_reads_its_share_and_at_most_5_percent_more(loaded, folder, form):
    total = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    for one in loaded:
        # What stays as it is stored has the bytes of what must be read for it.
        share = sum(len(data) // 2 for data in distinct(one["stored"]["shards"]).values())
        assert share <= one[form]["read_bytes"] <= 1.05 * share
        assert one[form]["read_bytes"] < 0.75 * total
