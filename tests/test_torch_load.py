"""`load_into`: checkpoints of every form into modules of every form, beside NeMo, transformers and plain numpy."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import folders
import numpy as np
import pytest
import torch
import transformers
from helpers import native_of
from nemo_oracle import assert_same, checkpoint, differences
from torch_load_cases import BF16, EXPERTS, SOURCES, blank
from torch_modules import from_transformers, fused_of, load, logits, module_of, nemo, tensors_of

from minimax_jax import synthetic
from minimax_jax.io.checkpoint import open_checkpoint
from torch_bridge import load_into

# ---- every form into every form


@pytest.mark.parametrize("form", ["native", "fused"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", SOURCES)
def test_every_checkpoint_into_every_module(odd, torch_sources, name, dtype, form):
    folder, hf = torch_sources
    through = BF16 if name.endswith("bf16") or dtype == torch.bfloat16 else np.dtype(np.float32)
    want = tensors_of(native_of(hf, odd, through))
    want = {
        key: tensor.to(dtype) if key.endswith(("_projs", "proj.weight")) else tensor for key, tensor in want.items()
    }
    if form == "fused":
        want = fused_of(want)
    module = module_of(blank(want))
    storage = {key: tensor.data_ptr() for key, tensor in module.state_dict().items()}
    loaded = load_into(module, folder / name)
    assert differences(module.state_dict(), want) == []
    assert {key: tensor.data_ptr() for key, tensor in module.state_dict().items()} == storage
    assert loaded.tensors == len(want) and loaded.read_bytes == open_checkpoint(folder / name).nbytes


def test_nemo_and_transformers_agree_on_what_was_loaded(torch_even):
    path, cfg = torch_even
    theirs = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    want = logits(theirs)
    by_adapter, streamed = load(nemo(cfg), checkpoint(cfg)), nemo(cfg)
    load_into(streamed, path)
    assert differences(streamed.state_dict(), by_adapter.state_dict()) == []
    assert torch.equal(logits(streamed), logits(by_adapter))
    # float32 throughout: the sums are made in another order, 3e-5 of logits up to 50 was seen.
    torch.testing.assert_close(logits(streamed), want, rtol=0, atol=1e-5 * float(want.abs().max()))
    ours = from_transformers(cfg)
    load_into(ours, path)
    assert differences(ours.state_dict(), theirs.state_dict()) == []
    assert torch.equal(logits(ours), want)


@pytest.mark.parametrize("kernels", ["numba", "xla"])
def test_with_and_without_the_kernels(odd, torch_sources, monkeypatch, kernels):
    monkeypatch.setenv("MINIMAX_JAX_CPU", kernels)
    folder, hf = torch_sources
    want = tensors_of(native_of(hf, odd, np.float32))
    module = module_of(blank(want))
    load_into(module, folder / "hf-fp8", workers=1)
    assert differences(module.state_dict(), want) == []


def test_names_without_prefix_and_one_file(odd, torch_sources, tmp_path):
    _, hf = torch_sources
    bare = {key.removeprefix("model."): array for key, array in hf.items()}
    want = tensors_of(native_of(hf, odd, np.float32))
    module = module_of(blank(want))
    load_into(module, folders.write(tmp_path / "bare", bare, odd) / "model.safetensors")
    assert differences(module.state_dict(), want) == []


# ---- dtypes


def test_float16_holds_dequantised_weights(odd, torch_sources):
    folder, hf = torch_sources
    want = tensors_of(native_of(hf, odd, np.float32))
    module = module_of(
        {k: torch.empty_like(t, dtype=torch.float16 if k.endswith("_projs") else t.dtype) for k, t in want.items()}
    )
    load_into(module, folder / "hf-fp8")
    key = EXPERTS + "down_projs"
    assert_same(module.state_dict()[key], want[key].to(torch.float16))


# ---- strictness


def test_small_pieces_give_the_same(odd, torch_sources, monkeypatch):
    folder, hf = torch_sources
    want = tensors_of(native_of(hf, odd, np.float32))
    monkeypatch.setattr("torch_bridge.load._PIECE_BYTES", 2**17)  # some rows, one expert
    for form in (want, fused_of(want)):
        module = module_of(blank(form))
        load_into(module, folder / "hf-fp8")
        assert differences(module.state_dict(), form) == []


# ---- memory


MEASURE = """
import sys
import torch
from plain_modules import fused_of, module_of
from minimax_jax import synthetic
from minimax_jax.layout.specs import specs
from torch_bridge import load_into
from torch_bridge.arrays import TORCH

def status_bytes(name):
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))

path, form, max_memory_bytes = sys.argv[1], sys.argv[2], int(sys.argv[3])
wanted = specs(synthetic.config(real=True, layers=1, experts=8, vocab_size=256)).native("BF16")
tensors = {spec.key: torch.full(spec.shape, float("nan"), dtype=TORCH[spec.dtype]) for spec in wanted}
module = module_of(fused_of(tensors) if form == "fused" else tensors)
del tensors
with open("/proc/self/clear_refs", "w") as reset:  # getrusage would count the memory of the process before exec
    reset.write("5")
start = status_bytes("VmRSS")
load_into(module, path, max_memory_bytes=max_memory_bytes)
assert not any(tensor.isnan().any() for tensor in module.state_dict().values())
print(status_bytes("VmHWM") - start)
"""


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """One layer of the published shapes with few experts: 160 MB, 310 MB in bfloat16."""
    folder = tmp_path_factory.mktemp("real") / "fp8"
    synthetic.synthesize(folder, synthetic.config(real=True, layers=1, experts=8, vocab_size=256))
    yield folder
    shutil.rmtree(folder)


@pytest.mark.parametrize("form,kernels", [("native", "numba"), ("fused", "xla")])
def test_the_peak_is_the_module_and_the_budget(real, form, kernels):
    budget_bytes = 420 * 10**6
    command = [sys.executable, "-c", MEASURE, str(real), form, str(budget_bytes)]
    paths = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parents[1])])
    environment = os.environ | {"XLA_FLAGS": "", "MINIMAX_JAX_CPU": kernels, "PYTHONPATH": paths}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert int(done.stdout) < budget_bytes
