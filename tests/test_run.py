"""Conversions on disk: what comes out, held against the pure functions and read by the safetensors library."""

import json
import shutil

import folders
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from folders import SIDECAR, SUFFIX
from run_cases import RAGGED, SCALED, TINY, hf_names, hf_tree, make

import minimax_jax as mj
from minimax_jax import synthetic
from minimax_jax.layout.specs import specs
from minimax_jax.ops.scaled import BlockScaled

DTYPE = {"bf16": jnp.bfloat16, "f32": jnp.float32}
SOURCES = [(layout, dtype) for layout in ("hf", "native") for dtype in ("fp8", "bf16", "f32")]
TARGETS = [("native", "bf16"), ("native", "f32"), ("native", "fp8"), ("hf", "bf16"), ("hf", "f32"), ("hf-fp8", None)]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return make(tmp_path_factory.mktemp("made"))


def brought_to(native, config, dtype):
    """A native tree with its block-scaled weights in another dtype, by the pure functions and numpy."""
    if dtype == "fp8":
        return mj.from_hf(mj.to_hf(native, config, quantization=True), config, dtype=None)
    scaled = {entry.native for entry in specs(config).entries if entry.row.scaled}
    return {key: cast(leaf, DTYPE[dtype]) if key in scaled else leaf for key, leaf in native.items()}


def cast(leaf, dtype):
    return leaf.dequantize(dtype) if isinstance(leaf, BlockScaled) else np.asarray(leaf).astype(dtype)


@pytest.fixture(scope="module")
def ragged(tmp_path_factory):
    """The same model as six checkpoints: folder by layout and dtype, and its native tree by dtype."""
    root = tmp_path_factory.mktemp("ragged")
    paths, trees = {}, {}
    for dtype in SCALED:
        stored = RAGGED if dtype == "fp8" else RAGGED.replace(weight_block_size=None)
        trees[dtype] = mj.from_hf(hf_tree(RAGGED, dtype), RAGGED, dtype=None)
        paths["hf", dtype] = root / f"hf-{dtype}"
        synthetic.synthesize(paths["hf", dtype], RAGGED, scaled=SCALED[dtype], shard_bytes=90_000)
        paths["native", dtype] = folders.write(root / f"native-{dtype}", trees[dtype], stored)
    return paths, trees


@pytest.mark.parametrize("source", SOURCES, ids="-".join)
@pytest.mark.parametrize("to,dtype", TARGETS)
def test_every_pair_equals_the_pure_functions(ragged, tmp_path, source, to, dtype):
    paths, trees = ragged
    mj.convert(paths[source], tmp_path / "out", to=to, dtype=dtype, shard_bytes=150_000)
    expected = brought_to(trees[source[1]], RAGGED, dtype or "fp8")
    if to != "native":
        expected = mj.to_hf(expected, RAGGED, quantization=dtype is None)
    assert folders.stored(tmp_path / "out") == folders.described(expected)


def test_native_bf16_is_what_numpy_makes_of_the_published_formula(tmp_path):
    synthetic.synthesize(tmp_path / "hf", TINY)
    mj.convert(tmp_path / "hf", tmp_path / "native")
    source, native = folders.arrays(tmp_path / "hf"), folders.arrays(tmp_path / "native")

    def weight(key):
        scales = np.repeat(np.repeat(source[key + SUFFIX], 128, 0), 128, 1)
        rows, cols = source[key].shape
        return (source[key].astype(np.float32) * scales[:rows, :cols]).astype(ml_dtypes.bfloat16)

    seen = set()
    for layer in range(2):
        attn, moe = f"model.layers.{layer}.self_attn.", f"model.layers.{layer}.block_sparse_moe.experts."
        for name in ("q_proj.weight", "k_proj.weight", "v_proj.weight", "o_proj.weight"):
            assert native[attn + name].tobytes() == weight(attn + name).tobytes()
            seen.add(attn + name)
        grouped = f"model.layers.{layer}.mlp.experts."
        for expert in range(4):
            gate, down, up = (weight(f"{moe}{expert}.w{n}.weight") for n in (1, 2, 3))
            both = np.concatenate([gate.T, up.T], axis=1)
            assert native[grouped + "gate_and_up_projs"][expert].tobytes() == both.tobytes()
            assert native[grouped + "down_projs"][expert].tobytes() == down.T.tobytes()
        seen |= {grouped + "gate_and_up_projs", grouped + "down_projs"}
    renamed = {
        key.replace("block_sparse_moe.e_score", "mlp.gate.e_score").replace("block_sparse_moe.gate", "mlp.gate"): key
        for key in source
        if "experts." not in key and "_proj." not in key
    }
    assert {key: native[key].tobytes() for key in renamed} == {n: source[k].tobytes() for n, k in renamed.items()}
    assert all(native[key].dtype == source[renamed[key]].dtype for key in renamed)
    assert set(native) == seen | set(renamed)


# --- the same bytes, however the work is cut up ----------------------------------------------------------------------


def test_the_source_has_scales_in_other_files_than_their_weights(made):
    weight_map = json.loads((made / "hf" / "model.safetensors.index.json").read_bytes())["weight_map"]
    apart = [key for key in weight_map if key + SUFFIX in weight_map and weight_map[key] != weight_map[key + SUFFIX]]
    assert len(apart) > 3 and len(set(weight_map.values())) > 10


@pytest.mark.parametrize("workers", [2, 4])
def test_any_number_of_workers_writes_the_same_files(made, tmp_path, workers):
    mj.convert(made / "hf", tmp_path / "out", shard_bytes=100_000, workers=workers)
    assert folders.files(tmp_path / "out") == folders.files(made / "native")


@pytest.mark.parametrize("most_bytes", [200, 900_000], ids=["single experts", "two experts"])
@pytest.mark.parametrize("to", ["native", "hf-fp8"])
def test_units_of_any_size_write_the_same_files(made, tmp_path, monkeypatch, most_bytes, to):
    source = made / ("hf" if to == "native" else "native")
    whole = mj.plan(source, to=to)
    mj.convert(source, tmp_path / "whole", to=to)
    monkeypatch.setattr("minimax_jax.jobs.plan.LEAST_UNIT_BYTES", most_bytes)
    monkeypatch.setattr("minimax_jax.jobs.plan._UNIT_BYTES", most_bytes)
    cut = mj.plan(source, to=to)
    assert len(cut.units) > len(whole.units)
    mj.convert(source, tmp_path / "cut", to=to, workers=4)
    assert folders.files(tmp_path / "cut") == folders.files(tmp_path / "whole")


# --- round trips -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["bf16", "f32", "fp8"])
def test_fp8_comes_back_byte_for_byte(made, tmp_path, dtype):
    mj.convert(made / "hf", tmp_path / "native", dtype=dtype)
    report = mj.convert(tmp_path / "native", tmp_path / "back", to="hf-fp8", shard_bytes=10**6)
    assert folders.stored(tmp_path / "back") == folders.stored(made / "hf")
    assert report.fresh_scales == ()
    assert report.kept_scales == (0 if dtype == "fp8" else sum(key.endswith(SUFFIX) for key in hf_names(RAGGED, "fp8")))


def test_other_block_sizes_survive_the_trip(tmp_path):
    config = RAGGED.replace(num_hidden_layers=1, num_local_experts=2, weight_block_size=(64, 7))
    synthetic.synthesize(tmp_path / "hf", config)
    mj.convert(tmp_path / "hf", tmp_path / "native")
    assert "quantization_config" not in json.loads((tmp_path / "native" / "config.json").read_bytes())
    mj.convert(tmp_path / "native", tmp_path / "again", dtype="bf16")
    mj.convert(tmp_path / "again", tmp_path / "back", to="hf-fp8")
    assert folders.converted(tmp_path / "again") == folders.converted(tmp_path / "native")
    assert folders.stored(tmp_path / "back") == folders.stored(tmp_path / "hf")
    assert (tmp_path / "back" / "config.json").read_bytes() == (tmp_path / "hf" / "config.json").read_bytes()


# --- what stands beside the weights ----------------------------------------------------------------------------------


@pytest.mark.parametrize("source", ["hf", "native"])
@pytest.mark.parametrize("to,dtype", TARGETS)
def test_config_names_the_quantisation_exactly_of_fp8(made, tmp_path, source, to, dtype):
    mj.convert(made / source, tmp_path / "out", to=to, dtype=dtype)
    written = json.loads((tmp_path / "out" / "config.json").read_bytes())
    original = json.loads((made / "hf" / "config.json").read_bytes())
    quantization = written.pop("quantization_config", None)
    assert quantization == (original["quantization_config"] if "fp8" in (to + str(dtype)) else None)
    assert written == {name: value for name, value in original.items() if name != "quantization_config"}
    assert written["rotary_dim"] == 50 and written["rope_parameters"]["partial_rotary_factor"] == 0.5  # both forms
    assert (tmp_path / "out" / SIDECAR).exists() == (to == "native" and dtype != "fp8")


def test_side_files_are_copied_byte_for_byte_and_nothing_else(made, tmp_path):
    shutil.copytree(made / "hf", tmp_path / "hf")
    (tmp_path / "hf" / "vocab.txt").write_bytes(bytes(range(256)))
    (tmp_path / "hf" / "pytorch_model.bin").write_bytes(b"pickle")
    (tmp_path / "hf" / ".gitattributes").touch()
    (tmp_path / "hf" / "folder").mkdir()
    mj.convert(tmp_path / "hf", tmp_path / "out")
    side = {"vocab.txt", "tokenizer.json", "tokenizer_config.json", "generation_config.json"}
    got, was = folders.files(tmp_path / "out"), {name: (tmp_path / "hf" / name).read_bytes() for name in side}
    assert set(got) == side | {"README.md", "config.json", "model.safetensors", SIDECAR}
    assert {name: got[name] for name in side} == was


def test_one_file_has_no_index_and_several_a_true_one(made, tmp_path):
    mj.convert(made / "native", tmp_path / "one", to="hf")
    assert (tmp_path / "one" / "model.safetensors").exists()
    assert not (tmp_path / "one" / "model.safetensors.index.json").exists()
    mj.convert(made / "native", tmp_path / "several", to="hf", shard_bytes=300_000)
    index = json.loads((tmp_path / "several" / "model.safetensors.index.json").read_bytes())
    tensors = folders.stored(tmp_path / "several")
    assert set(index["weight_map"]) == set(tensors) == set(hf_names(RAGGED, "bf16"))
    assert index["metadata"]["total_size"] == sum(len(data) for _, _, data in tensors.values())
    names = sorted(file.name for file in (tmp_path / "several").glob("*.safetensors"))
    assert names == [f"model-{n:05d}-of-{len(names):05d}.safetensors" for n in range(1, len(names) + 1)]
    for name in names:
        held = folders.library_reads((tmp_path / "several" / name).read_bytes())
        assert sum(len(data) for _, _, data in held.values()) <= 300_000 or len(held) == 1


def test_names_without_the_prefix_stay_without_it(tmp_path):
    tree = {key.removeprefix("model."): array for key, array in hf_tree(RAGGED, "fp8").items()}
    folders.write(tmp_path / "hf", tree, RAGGED)
    mj.convert(tmp_path / "hf", tmp_path / "native")
    assert folders.stored(tmp_path / "native") == folders.described(mj.from_hf(tree, RAGGED))
    mj.convert(tmp_path / "native", tmp_path / "back", to="hf-fp8")
    assert folders.stored(tmp_path / "back") == folders.stored(tmp_path / "hf")


def test_the_report_counts_what_happened(made, tmp_path):
    moments = []
    report = mj.convert(made / "hf", tmp_path / "out", shard_bytes=100_000, progress=moments.append)
    weights = folders.stored(tmp_path / "out")
    assert report.destination == tmp_path / "out"
    assert report.tensors == len(weights)
    assert report.written_bytes == sum(file.stat().st_size for file in (tmp_path / "out").glob("*.safetensors"))
    scales = sum(len(data) for key, (_, _, data) in folders.stored(made / "hf").items() if key.endswith(SUFFIX))
    read = sum(len(data) for _, _, data in folders.stored(made / "hf").values())
    assert report.read_bytes == read + scales  # once for the weights, once for the sidecar
    done = [moment.done_bytes for moment in moments]
    assert done == sorted(done) and done[-1] == report.read_bytes == moments[-1].total_bytes
