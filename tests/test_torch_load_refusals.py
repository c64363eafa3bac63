"""`load_into` where checkpoint and module do not fit: all is told at once, and nothing is written."""

import warnings

import folders
import pytest
import torch
import transformers
from helpers import config, native_of, random_hf
from nemo_oracle import differences
from torch_load_cases import ATTENTION, BF16, blank
from torch_modules import SIZES, count_reads, from_transformers, logits, module_of, nemo, tensors_of

from minimax_jax.errors import FormatError, JobError, LayoutError
from minimax_jax.io.checkpoint import open_checkpoint
from torch_bridge import load_into


def test_what_would_be_rounded_needs_permission(torch_even):
    path, cfg = torch_even
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


def test_everything_that_does_not_fit_is_in_one_error(odd, torch_sources):
    folder, hf = torch_sources
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


def test_a_stage_of_a_pipeline_lacks_tensors(odd, torch_sources, monkeypatch):
    folder, hf = torch_sources
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


def test_weights_that_only_the_module_ties(torch_even):
    path, cfg = torch_even
    with pytest.raises(LayoutError, match="one storage for two tensors"):
        load_into(from_transformers(cfg, tie_word_embeddings=True), path)


def test_a_budget_below_one_piece(torch_even):
    path, cfg = torch_even
    with pytest.raises(JobError, match="budget too small"):
        load_into(nemo(cfg), path, max_memory_bytes=2**20)
    with pytest.raises(JobError, match="no workers"):
        load_into(nemo(cfg), path, workers=0)


def test_a_file_that_shrinks_while_it_is_read(torch_even, tmp_path, monkeypatch):
    _, cfg = torch_even
    copy = folders.write(tmp_path / "copy", random_hf(cfg), cfg)
    original = load_into.__globals__["find_homes"]

    def shrink(*args, **kwargs):
        with (copy / "model.safetensors").open("r+b") as file:
            file.truncate(100_000)
        return original(*args, **kwargs)

    monkeypatch.setitem(load_into.__globals__, "find_homes", shrink)
    with pytest.raises(FormatError):
        load_into(nemo(cfg), copy)
