"""Peak memory of the adapter at the published shapes, in processes of their own."""

import os
import subprocess
import sys

import pytest

MEASURE = """
import sys
from types import SimpleNamespace
import torch
from torch_bridge import MiniMaxM2StateDictAdapter

def status_bytes(name):
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))

def adapter(experts):
    moe = SimpleNamespace(n_routed_experts=experts, moe_inter_dim=1536)
    return MiniMaxM2StateDictAdapter(SimpleNamespace(hidden_size=3072), moe, None, dtype=torch.bfloat16)

def checkpoint(experts):
    found = {}
    for expert in range(experts):
        for name, shape in (("w1", (1536, 3072)), ("w3", (1536, 3072)), ("w2", (3072, 1536))):
            key = f"model.layers.0.block_sparse_moe.experts.{expert}.{name}.weight"
            found[key] = torch.full(shape, 77, dtype=torch.uint8).view(torch.float8_e4m3fn)
            found[key + "_scale_inv"] = torch.rand(shape[0] // 128, shape[1] // 128)
    return found

adapter(4).from_hf(checkpoint(4))  # programs are compiled, threads have started
start = status_bytes("VmRSS")
hf = checkpoint(16)
with open("/proc/self/clear_refs", "w") as reset:
    reset.write("5")
native = adapter(16).from_hf(hf)
print((status_bytes("VmHWM") - start) / sum(tensor.nbytes for tensor in native.values()))
"""


@pytest.mark.parametrize("backend", ["xla", "numba"])
def test_from_hf_peaks_at_its_output_and_a_tenth(backend):
    environment = os.environ | {"XLA_FLAGS": "", "MINIMAX_JAX_CPU": backend}
    done = subprocess.run([sys.executable, "-c", MEASURE], env=environment, capture_output=True, text=True, check=True)
    assert 0.9 < float(done.stdout) <= 1.1
