"""What `convert` says at its end: the lines that load the result are executed as they are printed."""

import contextlib
import io
import json
from types import SimpleNamespace

import folders
import jax
import numpy as np
import pytest
import torch
from command_line import run, run_json
from torch.distributed.checkpoint import FileSystemReader
from transformers import MiniMaxM2ForCausalLM

from minimax_jax import synthetic
from minimax_jax.jobs.loading import how_to_load

TARGETS = [
    ("native", None),
    ("native", "f32"),
    ("native", "fp8"),
    ("hf", None),
    ("hf", "f32"),
    ("hf-fp8", None),
    ("transformers-v5", None),
    ("transformers-v5", "f32"),
    ("orbax", None),
    ("orbax", "fp8"),
    ("dcp", None),
]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made") / "hf"
    # transformers takes size / grid for the size of a block: sizes must be whole blocks, or less than one
    synthetic.synthesize(folder, synthetic.config(layers=1, experts=3, hidden_size=128, intermediate_size=64))
    return folder


def printed(stdout):
    """The lines of code that follow the summary."""
    summary, _, code = stdout.partition("it is loaded by\n\n")
    lines = code.splitlines()
    assert summary.startswith("wrote ") and all(line.startswith("    ") for line in lines)
    return [line.removeprefix("    ") for line in lines]


@pytest.mark.parametrize(("to", "dtype"), TARGETS)
def test_the_lines_that_convert_prints_load_what_it_wrote(source, tmp_path, monkeypatch, to, dtype):
    monkeypatch.setattr(MiniMaxM2ForCausalLM, "_keep_in_fp32_modules_strict", None)  # which the lines may change
    options = ["--to", to, *(["--dtype", dtype] if dtype else [])]
    destination = tmp_path / "it's here"
    lines = printed(run("convert", source, destination, *options)[0])
    assert len(lines) == 3 and str(destination) in "".join(lines).replace("\\", "")
    names: dict[str, object] = {"model": nothing_yet(destination)} if to == "dcp" else {}
    names["router"] = folders.arrays(source)["model.layers.0.block_sparse_moe.gate.weight"]
    norm = folders.arrays(source)["model.norm.weight"].astype(np.float32)
    with contextlib.redirect_stderr(io.StringIO()):
        exec("\n".join(lines), names)
    CHECKS[to](names, norm)
    _, without_gpu, instead = lines[-1].partition("  # without a GPU: ")
    if without_gpu:
        exec(lines[-1].replace("dtype='auto', device_map='auto'", instead), names)
        check_router(names, norm)


def nothing_yet(folder):
    """A module with the tensors of a distributed checkpoint, all of them zero."""
    metadata = FileSystemReader(folder).read_metadata().state_dict_metadata
    tensors = {name: torch.zeros(own.size, dtype=own.properties.dtype) for name, own in metadata.items()}
    return SimpleNamespace(state_dict=lambda: tensors)


def check_jax(names, norm):
    np.testing.assert_array_equal(np.asarray(names["tree"]["model.norm.weight"]).astype(np.float32), norm)
    logits = jax.jit(lambda model: model(np.array([[1, 2, 3]])))(names["model"])
    assert logits.shape == (1, 3, 264) and np.isfinite(np.asarray(logits)).all()


def check_transformers(names, norm):
    np.testing.assert_array_equal(names["model"].state_dict()["model.norm.weight"].float().numpy(), norm)
    with torch.no_grad():
        assert names["model"](torch.tensor([[1, 2, 3]])).logits.isfinite().all()


def check_router(names, norm):
    """The router is as stored, float32; what is not of the model's dtype is the router alone."""
    check_transformers(names, norm)
    tensors, dtype = names["model"].state_dict(), names["model"].lm_head.weight.dtype
    others = {name.rsplit(".", 2)[1] for name, tensor in tensors.items() if tensor.dtype != dtype}
    assert others == (set() if dtype == torch.float32 else {"gate", "mlp"})  # its weight, and its bias
    router = tensors["model.layers.0.mlp.gate.weight"]
    assert router.dtype == torch.float32
    np.testing.assert_array_equal(router.numpy(), names["router"])


def check_torch(names, norm):
    np.testing.assert_array_equal(names["tensors"]["model.norm.weight"].float().numpy(), norm)
    assert all(tensor.any() for name, tensor in names["tensors"].items() if "gate." not in name)


CHECKS = {
    "native": check_jax,
    "orbax": check_jax,
    "hf": check_router,
    "transformers-v5": check_router,
    "hf-fp8": check_transformers,
    "dcp": check_torch,
}


def test_quiet_and_json_print_no_code_but_json_has_it(source, tmp_path):
    assert "import" not in run("convert", source, tmp_path / "quiet", "-q")[0]
    told, _ = run_json("convert", source, tmp_path / "json")
    assert told["load"] == list(how_to_load("native", None, tmp_path / "json")) and json.dumps(told)
    assert how_to_load("gguf", None, tmp_path) == ()
