"""Peak memory of writing Orbax checkpoints at the published shapes, in processes of their own."""

import json
import os
import subprocess
import sys

import pytest

from minimax_jax import synthetic
from minimax_jax.jobs.orbax_plan import plan
from minimax_jax.jobs.source import open_source

MEASURE = """
import json, sys
from pathlib import Path
import jax.numpy as jnp
from minimax_jax.io import orbax
from minimax_jax.jobs.orbax import write
from minimax_jax.jobs.orbax_plan import plan
from minimax_jax.jobs.source import open_source

def status_bytes(name):
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))

jnp.zeros(8).block_until_ready()
orbax.require()
source, folder = open_source(sys.argv[1]), Path(sys.argv[2])
planned = plan(source, "BF16", max_memory_bytes=2**32, workers=1)
with open("/proc/self/clear_refs", "w") as reset:
    reset.write("5")
start = status_bytes("VmRSS")
report = write(source, folder, dtype="BF16", max_memory_bytes=planned.peak_bytes, workers=1)
print(json.dumps([status_bytes("VmHWM") - start, planned.peak_bytes, report.written_bytes]))
"""


def measured(tmp_path, layers, experts):
    config = synthetic.config(real=True, layers=layers, experts=experts, vocab_size=256)
    synthetic.synthesize(tmp_path / "hf", config)
    command = [sys.executable, "-c", MEASURE, *map(str, (tmp_path / "hf", tmp_path / "out"))]
    done = subprocess.run(command, env=os.environ | {"XLA_FLAGS": ""}, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def test_the_peak_keeps_to_the_plan_and_does_not_grow_with_layers_and_experts(tmp_path):
    (small, planned, wrote), (large, planned_large, wrote_large) = (
        measured(tmp_path / str(layers), layers, experts) for layers, experts in ((1, 4), (2, 8))
    )
    assert planned == planned_large
    assert wrote_large > 3 * 10**8 + wrote
    assert max(small, large) < planned < 6 * 10**8
    assert large - small < planned / 6


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    folder = tmp_path_factory.mktemp("published") / "hf"
    synthetic.synthesize(folder, synthetic.config(real=True), sparse=True)
    return open_source(folder)


@pytest.mark.parametrize(("dtype", "nbytes"), [("F8_E4M3", 230_121_630_720), ("BF16", 457_477_079_040)])
def test_the_published_model_is_written_whole_in_little_memory(published, dtype, nbytes):
    planned = plan(published, dtype, max_memory_bytes=6 * 10**8, workers=2)
    assert (planned.read_bytes, planned.write_bytes) == (230_121_630_720, nbytes)
    written = {}
    for unit in planned.units:  # every row once
        assert unit.first == written.get(unit.entry.native, 0)
        written[unit.entry.native] = unit.stop
    assert written == {entry.native: entry.shape[0] for entry in published.survey.entries}
