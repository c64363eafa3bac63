"""`save_hf`: modules of both forms to Hugging Face folders, beside transformers, the safetensors library and numpy."""

import json
import logging

import folders
import numpy as np
import pytest
import ranks
import storage_ranks
import torch
import transformers
from helpers import BF16, SUFFIX, config, native_of, quantize, random_hf
from nemo_oracle import differences
from torch_modules import SIZES, from_transformers, fused_of, logits, module_of, nemo, tensors_of

import minimax_jax as mj
from minimax_jax.errors import ConfigError, JobError, LayoutError, NumericError
from minimax_jax.io.checkpoint import INDEX_NAME
from torch_bridge import load_into, save_hf

WORLDS = (2, 4)
SCENARIOS = ranks.scenarios(storage_ranks, kind="save")
QUERY = "model.layers.0.self_attn.q_proj.weight"
DOWN = "model.layers.1.mlp.experts.down_projs"


@pytest.fixture(scope="module")
def source(odd, tmp_path_factory):
    """An FP8 checkpoint, and its scales."""
    hf = random_hf(odd)
    return folders.write(tmp_path_factory.mktemp("odd") / "fp8", hf, odd), mj.source_scales(hf, odd)


@pytest.fixture(scope="module")
def even(tmp_path_factory):
    cfg, folder = config(**SIZES), tmp_path_factory.mktemp("even") / "fp8"
    return folders.write(folder, random_hf(cfg), cfg), cfg


def natives(cfg, dtype=np.float32):
    return tensors_of(native_of(random_hf(cfg), cfg, dtype))


@pytest.fixture
def transformers_says():
    """What transformers logs; its loggers do not propagate."""
    said = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: said.append(record.getMessage())
    logger = logging.getLogger("transformers")
    logger.addHandler(handler)
    yield said
    logger.removeHandler(handler)


def reload(path, dtype=torch.float32):
    model, info = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=dtype, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model.eval()


@pytest.mark.parametrize("make", [nemo, from_transformers])
@pytest.mark.parametrize("shard_bytes", [10**9, 10**6])
def test_transformers_loads_what_was_saved(even, tmp_path, transformers_says, make, shard_bytes):
    path, cfg = even
    model, theirs = make(cfg), from_transformers(cfg)
    load_into(model, path)
    load_into(theirs, path)
    transformers_says.clear()
    report = save_hf(model, tmp_path / "saved", shard_bytes=shard_bytes)
    back = reload(tmp_path / "saved")
    assert transformers_says == []
    assert differences(back.state_dict(), theirs.state_dict()) == []
    assert torch.equal(logits(back), logits(theirs))
    files = list((tmp_path / "saved").glob("*.safetensors"))
    assert (len(files) > 1) == (shard_bytes < 10**7) == (tmp_path / "saved" / INDEX_NAME).exists()
    assert report.written_bytes == sum(file.stat().st_size for file in files)
    assert report.tensors == len(folders.stored(tmp_path / "saved"))


@pytest.mark.parametrize("make", [nemo, from_transformers])
def test_transformers_loads_fp8_that_was_saved(even, tmp_path, make):
    path, cfg = even
    model = make(cfg)
    load_into(model, path)
    report = save_hf(model, tmp_path / "fp8", quantization=True, scales=mj.source_scales(mj.read_tree(path), cfg))
    assert (report.kept_scales, report.fresh_scales) == (32, ())
    assert torch.equal(logits(reload(tmp_path / "fp8")), logits(reload(path)))


@pytest.mark.parametrize("form", ["native", "fused"])
@pytest.mark.parametrize("dtype", [np.float32, BF16])
def test_a_module_that_holds_every_bit_gives_the_source_back(odd, source, tmp_path, form, dtype):
    path, scales = source
    tensors = natives(odd, dtype)
    module = module_of(fused_of(tensors) if form == "fused" else tensors)
    if form == "fused":
        scales = {name: torch.from_numpy(np.array(grid)) for name, grid in scales.items()}
    save_hf(module, tmp_path / "back", quantization=True, scales=scales, config=odd)
    assert folders.stored(tmp_path / "back") == folders.stored(path)
    assert json.loads((tmp_path / "back" / "config.json").read_bytes())["quantization_config"]["fmt"] == "float8_e4m3fn"


@pytest.mark.parametrize("form", ["native", "fused"])
@pytest.mark.parametrize("dtype", [np.float32, BF16])
def test_float_weights_are_written_as_they_are(odd, tmp_path, form, dtype):
    tensors = natives(odd, dtype)
    save_hf(module_of(fused_of(tensors) if form == "fused" else tensors), tmp_path / "hf", config=odd)
    assert differences(storage_ranks.stored(tmp_path / "hf"), storage_ranks.hf_of(tensors)) == []
    assert "quantization_config" not in json.loads((tmp_path / "hf" / "config.json").read_bytes())


@pytest.mark.parametrize("form", ["native", "fused"])
def test_fresh_scales_are_those_of_numpy(odd, tmp_path, form):
    tensors = natives(odd)
    save_hf(module_of(fused_of(tensors) if form == "fused" else tensors), tmp_path / "q", quantization=True, config=odd)
    got, hf = folders.arrays(tmp_path / "q"), storage_ranks.hf_of(tensors)
    for key in folders.scaled_weights(tmp_path / "q"):
        codes, scales = quantize(hf[key].numpy())
        assert np.array_equal(got[key + SUFFIX], scales), key
        assert got[key].tobytes() == codes.tobytes(), key


def test_a_weight_that_changed_gets_fresh_scales_alone(odd, source, tmp_path):
    path, scales = source
    tensors = natives(odd)
    tensors[QUERY][0, 0] += 1
    tensors[DOWN][2, 5, 7] += 1
    report = save_hf(module_of(tensors), tmp_path / "q", quantization=True, scales=scales, config=odd)
    changed = (QUERY, "model.layers.1.block_sparse_moe.experts.2.w2.weight")
    assert report.fresh_scales == tuple(sorted(changed)) and report.kept_scales == 30
    got, was = folders.stored(tmp_path / "q"), folders.stored(path)
    assert {key for key in was if got[key] != was[key]} <= {key + end for key in changed for end in ("", SUFFIX)}


def test_rows_in_pieces_give_the_same(odd, tmp_path, monkeypatch):
    tensors, moments = natives(odd), []
    monkeypatch.setattr("torch_bridge.save._PIECE_BYTES", 2**14)
    save_hf(module_of(tensors), tmp_path / "hf", config=odd, progress=moments.append)
    assert differences(storage_ranks.stored(tmp_path / "hf"), storage_ranks.hf_of(tensors)) == []
    assert moments[-1].done_bytes == moments[-1].total_bytes == sum(tensor.nbytes for tensor in tensors.values())


def test_a_tied_module(tmp_path):
    cfg = config(**SIZES, tie_word_embeddings=True)
    path = folders.write(tmp_path / "tied", random_hf(cfg), cfg)
    model = from_transformers(cfg)
    load_into(model, path)
    save_hf(model, tmp_path / "back")
    assert "lm_head.weight" not in folders.stored(tmp_path / "back")
    assert torch.equal(logits(reload(tmp_path / "back")), logits(model))


# ---- refusals


def test_nan_is_named_wherever_it_is(odd, tmp_path):
    tensors = natives(odd)
    tensors[QUERY][3, 3] = float("nan")
    tensors[DOWN][1, 0, 0] = float("inf")
    with pytest.raises(NumericError) as caught:
        save_hf(module_of(tensors), tmp_path / "q", quantization=True, config=odd)
    keys = {problem.key for problem in caught.value.problems}
    assert keys == {QUERY, "model.layers.1.block_sparse_moe.experts.1.w2.weight"}
    assert list(tmp_path.iterdir()) == []


def test_what_does_not_fit_is_refused(odd, source, tmp_path):
    tensors = natives(odd)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").touch()
    with pytest.raises(JobError, match="not an empty folder"):
        save_hf(module_of(tensors), tmp_path / "taken", config=odd)
    with pytest.raises(ConfigError, match="no config"):
        save_hf(module_of(tensors), tmp_path / "new")
    wrong = {QUERY + SUFFIX: np.ones((1, 1), np.float32), "else": np.ones((1, 1), np.float32)}
    with pytest.raises(LayoutError, match="not the source scales") as caught:
        save_hf(module_of(tensors), tmp_path / "new", quantization=True, scales=wrong, config=odd)
    assert len(caught.value.problems) == 2
    del tensors["model.norm.weight"]
    with pytest.raises(LayoutError, match="no such tensor"):
        save_hf(module_of(tensors), tmp_path / "new", config=odd)
    assert not (tmp_path / "new").exists()


# ---- several processes


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    return {w: ranks.run(w, SCENARIOS, None, tmp_path_factory.mktemp(f"save{w}")) for w in WORLDS}


@pytest.mark.parametrize("name", SCENARIOS)
@pytest.mark.parametrize("world", WORLDS)
def test_in_several_processes(outcomes, world, name):
    assert outcomes[world][name] == [""] * world
