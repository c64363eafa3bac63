"""`load_into`: checkpoints of every form into modules of every form, beside NeMo, transformers and plain numpy."""

import contextlib
import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import folders
import ml_dtypes
import numpy as np
import pytest
import ranks
import storage_ranks
import test_torch_mesh
import torch
import transformers
from helpers import config, native_of, random_hf
from nemo_oracle import assert_same, checkpoint, differences
from rank_tensors import distribute, piece
from test_torch_model import load
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.debug import _clear_sharding_prop_cache
from torch_modules import (
    SIZES,
    count_reads,
    from_transformers,
    fused_of,
    logits,
    module_of,
    nemo,
    poison,
    tensors_of,
)

import minimax_jax as mj
from minimax_jax import synthetic
from minimax_jax.errors import FormatError, JobError, LayoutError
from minimax_jax.io.checkpoint import open_checkpoint
from torch_bridge import load_into
from torch_bridge.mesh import experts_layout

BF16 = np.dtype(ml_dtypes.bfloat16)
SOURCES = ("hf-fp8", "hf-f32", "hf-bf16", "native-f32", "native-bf16", "native-fp8")
ATTENTION = "model.layers.0.self_attn."
EXPERTS = "model.layers.0.mlp.experts."
WORLDS = (2, 4)
SCENARIOS = ranks.scenarios(storage_ranks, kind="load")


@pytest.fixture(scope="module")
def odd():
    """Sizes that are no multiples of a block, nor are their halves."""
    return config(num_local_experts=4)


def write_all(folder, cfg):
    """A random checkpoint in every form; gives its Hugging Face tensors."""
    hf = random_hf(cfg)
    folders.write(folder / "hf-fp8", hf, cfg)
    for name in SOURCES[1:]:
        to, dtype = name.split("-")
        mj.convert(folder / "hf-fp8", folder / name, to=to, dtype=dtype)
    return hf


@pytest.fixture(scope="module")
def sources(odd, tmp_path_factory):
    folder = tmp_path_factory.mktemp("odd")
    return folder, write_all(folder, odd)


@pytest.fixture(scope="module")
def even(tmp_path_factory):
    """A checkpoint that NeMo and transformers can both load."""
    cfg, folder = config(**SIZES), tmp_path_factory.mktemp("even") / "fp8"
    return folders.write(folder, random_hf(cfg), cfg), cfg


@contextlib.contextmanager
def rank_of(rank, **dims):
    """As in the tests of meshes. What torch remembers of operations on DTensors is of the rank that came before."""
    _clear_sharding_prop_cache()
    with test_torch_mesh.rank_of(rank, **dims) as mesh:
        yield mesh


def blank(tensors):
    return {name: torch.full_like(tensor, float("nan")) for name, tensor in tensors.items()}


# ---- every form into every form


@pytest.mark.parametrize("form", ["native", "fused"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", SOURCES)
def test_every_checkpoint_into_every_module(odd, sources, name, dtype, form):
    folder, hf = sources
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


def test_nemo_and_transformers_agree_on_what_was_loaded(even):
    path, cfg = even
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
def test_with_and_without_the_kernels(odd, sources, monkeypatch, kernels):
    monkeypatch.setenv("MINIMAX_JAX_CPU", kernels)
    folder, hf = sources
    want = tensors_of(native_of(hf, odd, np.float32))
    module = module_of(blank(want))
    load_into(module, folder / "hf-fp8", workers=1)
    assert differences(module.state_dict(), want) == []


def test_names_without_prefix_and_one_file(odd, sources, tmp_path):
    _, hf = sources
    bare = {key.removeprefix("model."): array for key, array in hf.items()}
    want = tensors_of(native_of(hf, odd, np.float32))
    module = module_of(blank(want))
    load_into(module, folders.write(tmp_path / "bare", bare, odd) / "model.safetensors")
    assert differences(module.state_dict(), want) == []


# ---- dtypes


def test_what_would_be_rounded_needs_permission(even):
    path, cfg = even
    module = from_transformers(cfg, torch.bfloat16)
    with pytest.raises(LayoutError, match="would be rounded") as caught:
        load_into(module, path)
    routers = {problem.key for problem in caught.value.problems}
    leaves = ("gate.weight", "e_score_correction_bias")
    assert routers == {f"model.layers.{layer}.mlp.{leaf}" for layer in range(2) for leaf in leaves}
    assert all(tensor.isnan().all() for tensor in module.state_dict().values())
    load_into(module, path, narrow=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
    assert differences(module.state_dict(), theirs.state_dict()) == []


def test_float16_holds_dequantised_weights(odd, sources):
    folder, hf = sources
    want = tensors_of(native_of(hf, odd, np.float32))
    module = module_of(
        {k: torch.empty_like(t, dtype=torch.float16 if k.endswith("_projs") else t.dtype) for k, t in want.items()}
    )
    load_into(module, folder / "hf-fp8")
    key = EXPERTS + "down_projs"
    assert_same(module.state_dict()[key], want[key].to(torch.float16))


# ---- strictness


def test_everything_that_does_not_fit_is_in_one_error(odd, sources):
    folder, hf = sources
    want = blank(tensors_of(native_of(hf, odd, BF16)))
    del want["model.norm.weight"]
    want["model.layers.0.mlp.shared"] = torch.zeros(3)
    want[ATTENTION + "q_proj.weight"] = torch.zeros(3, 3)
    want[ATTENTION + "k_proj.weight"] = want[ATTENTION + "k_proj.weight"].to(torch.float8_e4m3fn)
    want[ATTENTION + "v_proj.weight"] = want[ATTENTION + "v_proj.weight"].to("meta")
    want[ATTENTION + "q_norm.weight"] = want[ATTENTION + "q_norm.weight"].to("meta")
    module = module_of(want)
    with pytest.raises(LayoutError) as caught:
        load_into(module, folder / "hf-fp8")
    found = {problem.key.rpartition("layers.0.")[2]: problem.what for problem in caught.value.problems}
    assert found == {
        "model.norm.weight": "the module has no such tensor",
        "mlp.shared": "a tensor of the module that no checkpoint has",
        "self_attn.q_proj.weight": "a tensor of another shape",
        "self_attn.k_proj.weight": "a dtype that cannot hold weights",
        "self_attn.v_proj.weight": "a tensor without memory",
        "self_attn.q_norm.weight": "a tensor without memory",
    }
    assert want["lm_head.weight"].isnan().all()  # nothing was written


def test_a_stage_of_a_pipeline_lacks_tensors(odd, sources, monkeypatch):
    folder, hf = sources
    stage = {k: t for k, t in tensors_of(native_of(hf, odd, BF16)).items() if ".layers.1." in k}
    module = module_of(blank(stage))
    with pytest.raises(LayoutError, match="no such tensor"):
        load_into(module, folder / "hf-fp8")
    with count_reads(monkeypatch) as reads:
        loaded = load_into(module, folder / "hf-fp8", partial=True)
    assert differences(module.state_dict(), stage) == []
    infos = open_checkpoint(folder / "hf-fp8").tensors
    assert sum(stop - start for _, start, stop in reads) == loaded.read_bytes
    assert loaded.read_bytes == sum(info.nbytes for key, info in infos.items() if ".layers.1." in key)


def test_tied_weights(tmp_path):
    cfg = config(**SIZES, tie_word_embeddings=True)
    path = folders.write(tmp_path / "tied", random_hf(cfg), cfg)
    tied = from_transformers(cfg)
    assert tied.lm_head.weight is tied.model.embed_tokens.weight
    load_into(tied, path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    assert torch.equal(logits(tied), logits(theirs))
    with pytest.raises(LayoutError, match="no checkpoint has") as caught:
        load_into(from_transformers(cfg, tie_word_embeddings=False), path)
    assert [problem.key for problem in caught.value.problems] == ["lm_head.weight"]


def test_weights_that_only_the_module_ties(even):
    path, cfg = even
    with pytest.raises(LayoutError, match="one storage for two tensors"):
        load_into(from_transformers(cfg, tie_word_embeddings=True), path)


def test_a_budget_below_one_piece(even):
    path, cfg = even
    with pytest.raises(JobError, match="budget too small"):
        load_into(nemo(cfg), path, max_memory_bytes=2**20)
    with pytest.raises(JobError, match="no workers"):
        load_into(nemo(cfg), path, workers=0)


def test_small_pieces_give_the_same(odd, sources, monkeypatch):
    folder, hf = sources
    want = tensors_of(native_of(hf, odd, np.float32))
    monkeypatch.setattr("torch_bridge.load._PIECE_BYTES", 2**17)  # some rows, one expert
    for form in (want, fused_of(want)):
        module = module_of(blank(form))
        load_into(module, folder / "hf-fp8")
        assert differences(module.state_dict(), form) == []


def test_a_file_that_shrinks_while_it_is_read(even, tmp_path, monkeypatch):
    _, cfg = even
    copy = folders.write(tmp_path / "copy", random_hf(cfg), cfg)
    original = load_into.__globals__["find_homes"]

    def shrink(*args, **kwargs):
        with (copy / "model.safetensors").open("r+b") as file:
            file.truncate(100_000)
        return original(*args, **kwargs)

    monkeypatch.setitem(load_into.__globals__, "find_homes", shrink)
    with pytest.raises(FormatError):
        load_into(nemo(cfg), copy)


# ---- shards


@pytest.mark.parametrize("form", ["native", "fused"])
@pytest.mark.parametrize("name", ["hf-fp8", "native-fp8", "native-bf16"])
@pytest.mark.parametrize("experts", [(Shard(0), Shard(1)), (Shard(2), Shard(1)), (Shard(1), Replicate())])
def test_any_shard_of_any_form(odd, sources, name, form, experts):
    folder, hf = sources
    want = tensors_of(native_of(hf, odd, BF16))
    want = fused_of(want) if form == "fused" else want
    for rank in range(4):
        with rank_of(rank, a=2, b=2) as mesh:

            def placements(tensor):
                return experts if tensor.ndim == 3 else (Shard(0), Shard(tensor.ndim - 1))

            sharded = {k: distribute(torch.full_like(t, float("nan")), mesh, placements(t)) for k, t in want.items()}
            module = module_of(sharded)
            load_into(module, folder / name)
            for key, tensor in module.state_dict().items():
                assert_same(tensor.to_local(), piece(want[key], mesh, placements(tensor)))


@pytest.mark.parametrize("dims", [{"ep": 4}, {"ep_shard": 2, "ep": 2}, {"ep_replicate": 2, "ep": 2}])
def test_plain_tensors_of_a_rank_on_a_mesh(odd, sources, dims):
    folder, hf = sources
    want = tensors_of(native_of(hf, odd, BF16))
    for rank in range(4):
        with rank_of(rank, **dims) as mesh:
            layout = experts_layout(mesh)
            mine = {k: piece(t, mesh[layout.mesh.mesh_dim_names], layout.placements) if t.ndim == 3 else t
                    for k, t in want.items()}  # fmt: skip
            module = module_of(blank(mine))
            load_into(module, folder / "hf-fp8", mesh)
            assert differences(module.state_dict(), mine) == []
            wrong = module_of(blank(mine | {EXPERTS + "down_projs": torch.zeros(1, 2, 3)}))
            with pytest.raises(LayoutError, match="another shape"):
                load_into(wrong, folder / "hf-fp8", mesh)


def test_a_rank_reads_its_experts_and_rows_alone(odd, sources, monkeypatch):
    folder, hf = sources
    infos = open_checkpoint(folder / "hf-fp8").tensors
    rows = (ATTENTION + "q_proj.weight", "lm_head.weight")
    want = tensors_of(native_of(hf, odd, BF16))
    every = set()
    for rank in range(2):
        with rank_of(rank, ep=2) as mesh, count_reads(monkeypatch) as reads:
            mine = {str(expert) for expert in (0, 1)} if rank == 0 else {"2", "3"}
            module = module_of({
                k: distribute(t, mesh, (Shard(0),)) if t.ndim == 3 or k in rows else t for k, t in want.items()
            })  # fmt: skip
            poison(module)
            loaded = load_into(module, folder / "hf-fp8")
        wanted = 0
        for key, info in infos.items():
            whole = ".experts." not in key or key.split(".")[5] in mine
            wanted += info.nbytes // 2 if key in rows else info.nbytes if whole else 0
        assert loaded.read_bytes == wanted == sum(stop - start for _, start, stop in reads)
        foreign = [i for k, i in infos.items() if ".experts." in k and k.split(".")[5] not in mine]
        assert not any(i.start < stop and start < i.stop for i in foreign for _, start, stop in reads)
        every |= set(reads)
    assert sum(stop - start for _, start, stop in every) == sum(info.nbytes for info in infos.values())


def test_a_native_checkpoint_is_read_by_ranges_too(odd, sources, monkeypatch):
    folder, hf = sources
    want = tensors_of(native_of(hf, odd, BF16))
    infos = open_checkpoint(folder / "native-bf16").tensors
    with rank_of(3, ep_shard=2, ep=2) as mesh:
        sharded = {k: distribute(t, mesh, (Shard(1), Shard(0))) if t.ndim == 3 else t for k, t in want.items()}
        module = poison(module_of(sharded))
        loaded = load_into(module, folder / "native-bf16")
        assert all(torch.equal(t.to_local(), piece(want[k], mesh, (Shard(1), Shard(0)))) for k, t in sharded.items()
                   if t.ndim == 3)  # fmt: skip
    assert loaded.read_bytes == sum(info.nbytes // (4 if len(info.shape) == 3 else 1) for info in infos.values())


@pytest.fixture(scope="module")
def outcomes(sources, tmp_path_factory):
    folder, _ = sources
    return {w: ranks.run(w, SCENARIOS, folder, tmp_path_factory.mktemp(f"load{w}")) for w in WORLDS}


@pytest.mark.parametrize("name", SCENARIOS)
@pytest.mark.parametrize("world", WORLDS)
def test_in_several_processes(outcomes, world, name):
    assert outcomes[world][name] == [""] * world


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
