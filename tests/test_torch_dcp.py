"""Distributed checkpoints: what is streamed and saved here, torch's own loader reads, and the other way round."""

import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import folders
import numpy as np
import pytest
import ranks
import storage_ranks
import torch
import torch.distributed.checkpoint as tdcp
from helpers import BF16, config, native_of, random_hf
from nemo_oracle import checkpoint, differences, our_adapter
from plain_modules import module_of
from torch_modules import SIZES, logits, nemo, poison, tensors_of
from torch_modules import load as load_by_adapter

import minimax_jax as mj
from minimax_jax import synthetic
from minimax_jax.errors import CheckpointError, FormatError, JobError, LayoutError, NumericError
from minimax_jax.jobs.source import open_source
from torch_bridge import dcp, save_hf
from torch_bridge.arrays import TORCH

WORLDS = (2, 4)
SCENARIOS = ranks.scenarios(storage_ranks, kind="dcp")
NAMES = {"BF16": "bf16", "F32": "f32", "F8_E4M3": "fp8"}
HOW = {"max_memory_bytes": 2**30, "workers": 2}


@pytest.fixture(scope="module")
def sources(odd, tmp_path_factory):
    """One checkpoint as Hugging Face FP8, and natively in every dtype."""
    folder = tmp_path_factory.mktemp("sources")
    folders.write(folder / "hf", random_hf(odd), odd)
    (folder / "hf" / "tokenizer.json").write_text("{}")
    for name in NAMES.values():
        mj.convert(folder / "hf", folder / name, to="native", dtype=name)
    dcp.write(open_source(folder / "hf"), folder / "streamed", dtype="BF16", **HOW)
    return folder


def read(path, like, **how):
    """Tensors of the names, dtypes and shapes of a safetensors folder, as torch's own loader reads them."""
    tensors = {key: torch.zeros(shape, dtype=TORCH[dtype]) for key, (dtype, shape, _) in folders.stored(like).items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns that it is not distributed
        tdcp.load(tensors, **(how or {"checkpoint_id": path}))
    return tensors


def natives(cfg, dtype=np.float32):
    return tensors_of(native_of(random_hf(cfg), cfg, dtype))


def stored(folder):
    """What a safetensors folder holds, in torch."""
    return {key: torch.frombuffer(bytearray(data), dtype=TORCH[dtype]).reshape(shape)
            for key, (dtype, shape, data) in folders.stored(folder).items()}  # fmt: skip


# ---- streaming


@pytest.mark.parametrize("source", ["hf", "fp8", "bf16"])
@pytest.mark.parametrize("dtype", NAMES)
def test_torchs_loader_reads_what_was_streamed(sources, tmp_path, source, dtype):
    """The bf16 source has the FP8 source's scales beside it, so that its FP8 is that of the source."""
    moments = []
    opened = open_source(sources / source)
    report = dcp.write(opened, tmp_path / "dcp", dtype=dtype, progress=moments.append, **HOW)
    like = sources / NAMES[dtype]
    if (source, dtype) == ("bf16", "F32"):
        mj.convert(sources / "bf16", tmp_path / "like", to="native", dtype="f32")
        like = tmp_path / "like"
    assert differences(read(tmp_path / "dcp", like), stored(like)) == []
    assert mj.verify(tmp_path / "dcp", like, by="bytes").good
    assert report.tensors == len(folders.stored(like)) and report.destination == tmp_path / "dcp"
    assert moments[-1].done_bytes == moments[-1].total_bytes == report.read_bytes
    assert report.kept_scales == (32 if (source, dtype) == ("bf16", "F8_E4M3") else 0) and report.fresh_scales == ()
    beside = {"README.md", "config.json", "tokenizer.json"}
    assert folders.files(tmp_path / "dcp").keys() == {".metadata", "__0_0_0.distcp", *beside}
    written = mj.MiniMaxConfig.from_pretrained(tmp_path / "dcp")
    assert (written.weight_block_size is None) == (dtype != "F8_E4M3")


def test_nemos_model_loads_it(tmp_path):
    cfg = config(**SIZES)
    folders.write(tmp_path / "hf", random_hf(cfg), cfg)
    dcp.write(open_source(tmp_path / "hf"), tmp_path / "dcp", dtype="F32", **HOW)
    model = nemo(cfg)
    state = {name: tensor.float() for name, tensor in model.state_dict().items()}
    wanted = {key: torch.zeros(t.shape, dtype=t.dtype) for key, t in state.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tdcp.load(wanted, checkpoint_id=tmp_path / "dcp")
    model.load_state_dict(wanted, strict=True)
    assert torch.equal(logits(model), logits(load_by_adapter(nemo(cfg), checkpoint(cfg))))


def test_small_units_and_many_files_give_the_same(sources, tmp_path, monkeypatch):
    monkeypatch.setattr("torch_bridge.chunks._UNIT_BYTES", 20_000)
    monkeypatch.setattr("torch_bridge.dcp_items.DEFAULT_SHARD_BYTES", 500_000)
    dcp.write(open_source(sources / "hf"), tmp_path / "dcp", dtype="BF16", max_memory_bytes=2**30, workers=3)
    assert len(list((tmp_path / "dcp").glob("*.distcp"))) > 4
    assert differences(read(tmp_path / "dcp", sources / "bf16"), stored(sources / "bf16")) == []


def test_the_same_tensors_are_the_same_bytes_wherever_and_however_they_are_written(sources, tmp_path):
    for name, workers in (("one", 1), ("other", 3)):
        dcp.write(open_source(sources / "hf"), tmp_path / name, dtype="BF16", max_memory_bytes=2**30, workers=workers)
        tensors = {"a": torch.arange(6.0).reshape(2, 3)}
        dcp.save(tensors, tmp_path / f"saved-{name}", config(**SIZES))
    for prefix in ("", "saved-"):
        one = folders.files(tmp_path / f"{prefix}one")
        assert one == folders.files(tmp_path / f"{prefix}other")
        assert str(tmp_path).encode() not in one[".metadata"]


def test_failures_leave_no_more_than_what_is_done(odd, sources, tmp_path):
    copy = shutil.copytree(sources / "hf", tmp_path / "copy")
    opened = open_source(copy)
    with (copy / "model.safetensors").open("r+b") as file:
        file.truncate(200_000)
    with pytest.raises(FormatError):
        dcp.write(opened, tmp_path / "dcp", dtype="BF16", **HOW)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["copy"]  # nothing was done
    nan = shutil.copytree(sources / "f32", tmp_path / "nan")
    folders.edit(nan, "model.layers.1.mlp.experts.down_projs", lambda tensor: tensor.fill_(float("nan")))
    with pytest.raises(NumericError) as caught:
        dcp.write(open_source(nan), tmp_path / "dcp", dtype="F8_E4M3", **HOW)
    assert ["the same command goes on" in note for note in caught.value.__notes__] == [True]
    assert sorted(path.name for path in tmp_path.iterdir()) == [".dcp.partial", "copy", "nan"]
    with pytest.raises(KeyboardInterrupt):
        dcp.write(open_source(sources / "hf"), tmp_path / "dcp", dtype="BF16", progress=_interrupt, restart=True, **HOW)
    with pytest.raises(JobError, match="budget too small"):
        dcp.write(open_source(sources / "hf"), tmp_path / "dcp", dtype="BF16", max_memory_bytes=2**20, workers=2)
    with pytest.raises(JobError, match="no workers"):
        dcp.write(open_source(sources / "hf"), tmp_path / "dcp", dtype="BF16", max_memory_bytes=2**30, workers=0)
    with pytest.raises(JobError, match="not an empty folder"):
        dcp.write(open_source(sources / "hf"), tmp_path / "nan", dtype="BF16", **HOW)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["copy", "nan"]


def _interrupt(_moment):
    raise KeyboardInterrupt


MEASURE = """
import sys
from pathlib import Path
from minimax_jax.jobs.source import open_source
from torch_bridge import dcp

def status_bytes(name):
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))

source = open_source(sys.argv[1])
with open("/proc/self/clear_refs", "w") as reset:  # getrusage would count the memory of the process before exec
    reset.write("5")
start = status_bytes("VmRSS")
dcp.write(source, Path(sys.argv[2]), dtype="BF16", max_memory_bytes=int(sys.argv[3]), workers=1)
print(status_bytes("VmHWM") - start)
"""


def test_the_peak_keeps_to_the_budget(tmp_path):
    """One layer of the published experts: 180 MB are read and 350 MB written."""
    sizes = {"layers": 1, "experts": 12, "vocab_size": 256, "num_attention_heads": 8}  # what cannot be split is small
    synthetic.synthesize(tmp_path / "hf", synthetic.config(real=True, **sizes))
    budget_bytes = 425 * 10**6
    command = [sys.executable, "-c", MEASURE, str(tmp_path / "hf"), str(tmp_path / "dcp"), str(budget_bytes)]
    environment = os.environ | {"XLA_FLAGS": "", "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert int(done.stdout) < budget_bytes


# ---- saving and loading


def test_there_and_back(odd, tmp_path):
    tensors = natives(odd, BF16)
    dcp.save(tensors, tmp_path / "dcp", odd)
    back = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
    dcp.load(back, tmp_path / "dcp")
    assert differences(back, tensors) == []
    assert mj.MiniMaxConfig.from_pretrained(tmp_path / "dcp") == odd
    module = poison(module_of(back))
    dcp.load(module.state_dict(), tmp_path / "dcp")  # straight into its storage
    assert differences(module.state_dict(), tensors) == []


def test_everything_that_does_not_fit_is_in_one_error(odd, tmp_path):
    tensors = natives(odd)
    dcp.save(tensors, tmp_path / "dcp", odd)
    asked = {name: torch.full_like(tensor, 7) for name, tensor in tensors.items()}
    del asked["lm_head.weight"]
    asked["else"] = torch.zeros(3)
    asked["model.norm.weight"] = torch.zeros(2)
    asked["model.embed_tokens.weight"] = asked["model.embed_tokens.weight"].to(torch.float16)
    with pytest.raises(LayoutError) as caught:
        dcp.load(asked, tmp_path / "dcp")
    problems = {problem.key: problem.what for problem in caught.value.problems}
    assert problems == {
        "lm_head.weight": "a tensor that nobody asked for",
        "else": "the checkpoint has no such tensor",
        "model.norm.weight": "another tensor than asked for",
        "model.embed_tokens.weight": "another tensor than asked for",
    }
    assert (asked["model.layers.0.mlp.gate.weight"] == 7).all()


@pytest.mark.parametrize("damage", [lambda file: file.unlink(), lambda file: file.write_bytes(b"no pickle")])
def test_no_checkpoint(odd, tmp_path, damage):
    dcp.save(natives(odd), tmp_path / "dcp", odd)
    damage(tmp_path / "dcp" / ".metadata")
    with pytest.raises(FormatError, match="no checkpoint can be opened"):
        dcp.load(natives(odd), tmp_path / "dcp")


def test_a_file_that_is_gone(odd, tmp_path):
    dcp.save(natives(odd), tmp_path / "dcp", odd)
    next((tmp_path / "dcp").glob("*.distcp")).unlink()
    with pytest.raises(CheckpointError, match="cannot be read"):
        dcp.load(natives(odd), tmp_path / "dcp")


# ---- torch's Hugging Face storage


@pytest.mark.parametrize("name", ["bf16", "f32", "fp8"])
def test_torchs_hugging_face_reader_reads_native_folders(sources, name):
    got = read(None, sources / name, storage_reader=tdcp.HuggingFaceStorageReader(str(sources / name)))
    assert differences(got, stored(sources / name)) == []


def test_torchs_quantized_reader_agrees_with_what_is_saved_as_fp8(odd, sources, tmp_path):
    tensors = natives(odd)
    save_hf(module_of(tensors), tmp_path / "fp8", quantization=True, config=odd, shard_bytes=10**6,
            scales=mj.source_scales(random_hf(odd), odd))  # fmt: skip
    hf = storage_ranks.hf_of(tensors)
    got = {key: torch.zeros(tensor.shape) for key, tensor in hf.items()}
    reader = tdcp.QuantizedHuggingFaceStorageReader(str(tmp_path / "fp8"), target_dtype=torch.float32, block_size=128)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tdcp.load(got, storage_reader=reader)
    assert all(torch.equal(got[key], tensor.float()) for key, tensor in hf.items())
    native = our_adapter(odd, torch.float32).from_hf(got)
    assert all(torch.equal(native[name], tensor.float()) for name, tensor in tensors.items())


# ---- several processes


@pytest.fixture(scope="module")
def outcomes(sources, tmp_path_factory):
    return {w: ranks.run(w, SCENARIOS, sources, tmp_path_factory.mktemp(f"dcp{w}")) for w in WORLDS}


@pytest.mark.parametrize("name", SCENARIOS)
@pytest.mark.parametrize("world", WORLDS)
def test_in_several_processes(outcomes, world, name):
    assert outcomes[world][name] == [""] * world
