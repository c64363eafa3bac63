"""Peak memory of conversions at the published shapes, in processes of their own."""

import json
import os
import shutil
import subprocess
import sys

import pytest

from minimax_jax import synthetic

MEASURE = """
import json, sys
import jax.numpy as jnp
import minimax_jax as mj
from minimax_jax.jobs import run

def status_bytes(name):
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))

jnp.zeros(8).block_until_ready()
source, folder, workers = *sys.argv[1:3], int(sys.argv[3])
found = []
for origin, name, to in [(source, "native", "native"), (folder + "/native", "back", "hf-fp8")]:
    planned = mj.plan(origin, to=to, workers=workers)
    with open("/proc/self/clear_refs", "w") as reset:  # getrusage would count the memory of the process before exec
        reset.write("5")
    start = status_bytes("VmRSS")
    run.run(planned, folder + "/" + name)
    found.append([status_bytes("VmHWM") - start, planned.peak_bytes])
print(json.dumps(found))
"""


SMALL, LARGE = (1, 6), (2, 12)


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Checkpoints of the published shapes, by (layers, experts)."""
    found = {}
    for layers, experts in (SMALL, LARGE):
        found[layers, experts] = tmp_path_factory.mktemp("sources") / "hf"
        config = synthetic.config(real=True, layers=layers, experts=experts, vocab_size=256)
        synthetic.synthesize(found[layers, experts], config)
    yield found
    for folder in found.values():
        shutil.rmtree(folder)


def peaks(source, backend, workers, tmp_path):
    """Measured and planned peak bytes of hf-fp8 to native, and of native to hf-fp8."""
    (tmp_path / "out").mkdir()
    command = [sys.executable, "-c", MEASURE, str(source), str(tmp_path / "out"), str(workers)]
    environment = os.environ | {"XLA_FLAGS": "", "MINIMAX_JAX_CPU": backend}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    shutil.rmtree(tmp_path / "out")
    return json.loads(done.stdout)


# Through XLA, how much memory two workers take is a matter of luck: of how often their largest units meet.
@pytest.mark.parametrize("backend,workers", [("xla", 1), ("numba", 2)])
def test_the_peak_keeps_to_the_plan_and_does_not_grow_with_layers_and_experts(sources, backend, workers, tmp_path):
    pairs = zip(*(peaks(sources[size], backend, workers, tmp_path) for size in (SMALL, LARGE)), strict=True)
    for (small, planned), (large, planned_large) in pairs:
        assert planned == planned_large < 600 * 10**6  # of a gigabyte that is read and written
        assert max(small, large) < planned
        assert large - small < planned / 6


HOARD = """
import sys
import numpy as np
from minimax_jax.jobs.heap import give_back

def resident_bytes():
    with open("/proc/self/statm") as pages:
        return int(pages.read().split()[1]) * 4096

start = resident_bytes()
arrays = [np.ones(100_000, np.uint8) for _ in range(2000)]
del arrays[:-1]  # the last one keeps glibc from shrinking the heap by itself
before = resident_bytes() - start
give_back(int(sys.argv[1]))
print(before, resident_bytes() - start)
"""


@pytest.mark.parametrize("freed_bytes,returned", [(2 * 10**8, True), (10**6, False)])
def test_memory_that_was_freed_goes_back_to_the_system_where_it_is_much(freed_bytes, returned):
    command = [sys.executable, "-c", HOARD, str(freed_bytes)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    before, after = map(int, done.stdout.split())
    assert before > 150 * 10**6
    assert (after < 20 * 10**6) == returned
