"""Opening a checkpoint for work: config, headers and sidecar held against each other before anything runs."""

import json
import math
import shutil
import sys

import folders
import pytest
import torch
from folders import SIDECAR
from safetensors.torch import load_file, save_file

import minimax_jax as mj
from minimax_jax import synthetic
from minimax_jax.errors import ConfigError, FormatError, LayoutError
from minimax_jax.jobs.source import batches, layout_specs, open_source
from minimax_jax.jobs.units import GroupScales
from minimax_jax.layout.forms import HOLDING_FP8
from minimax_jax.layout.specs import specs, total_bytes

CONFIG = synthetic.config(layers=1, experts=3)
DOWN = "model.layers.0.mlp.experts.down_projs"
QUERY = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    root = tmp_path_factory.mktemp("made")
    synthetic.synthesize(root / "hf", CONFIG)
    mj.convert(root / "hf", root / "native")
    mj.convert(root / "hf", root / "fp8", dtype="fp8")
    return root


@pytest.fixture
def native(made, tmp_path):
    return shutil.copytree(made / "native", tmp_path / "native")


def refused(kind, folder, match):
    """The problems of a checkpoint that is refused, by `inspect` as by `plan`."""
    with pytest.raises(kind, match=match) as caught:
        mj.plan(folder)
    with pytest.raises(kind, match=match):
        mj.inspect(folder)
    return caught.value.problems


# --- what is found ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name,layout,dtype", [("hf", "hf", "F8_E4M3"), ("native", "native", "BF16"), ("fp8", "native", "F8_E4M3")]
)
def test_layout_and_dtypes_are_found_out(made, name, layout, dtype):
    source = open_source(made / name)
    assert source.survey.layout == layout
    assert source.survey.dtypes[DOWN] == source.survey.dtypes[QUERY] == dtype
    assert source.survey.dtypes["model.layers.0.mlp.gate.weight"] == "F32"
    assert source.config == CONFIG
    assert len(source.sidecar) == (6 if name == "native" else 0)


def test_a_file_and_an_index_are_opened_as_their_folder(made, tmp_path):
    file = made / "native" / "model.safetensors"
    opened = open_source(file)
    assert opened.survey == open_source(made / "native").survey
    assert opened.sidecar == open_source(made / "native").sidecar
    synthetic.synthesize(tmp_path / "hf", CONFIG, shard_bytes=50_000)
    index = open_source(str(tmp_path / "hf" / "model.safetensors.index.json"))
    assert index.checkpoint.tensors == open_source(tmp_path / "hf").checkpoint.tensors


def test_inspection_adds_up(made):
    seen = mj.inspect(made / "native")
    tensors = folders.stored(made / "native")
    assert (seen.total.tensors, seen.total.nbytes) == (len(tensors), sum(len(data) for _, _, data in tensors.values()))
    for tallies in (seen.by_dtype, seen.by_kind):
        assert sum(tally.tensors for tally in tallies.values()) == seen.total.tensors
        assert sum(tally.nbytes for tally in tallies.values()) == seen.total.nbytes
    for dtype, tally in seen.by_dtype.items():
        sizes = [len(data) for found, _, data in tensors.values() if found == dtype]
        assert (tally.tensors, tally.nbytes) == (len(sizes), sum(sizes))
    sidecar = folders.library_reads((made / "native" / SIDECAR).read_bytes())
    assert (seen.sidecar.tensors, seen.sidecar.nbytes) == (6, sum(len(data) for _, _, data in sidecar.values()))
    assert seen.files == 1 and seen.layout == "native" and seen.path == made / "native"


def test_batches_are_all_experts_once():
    entry = next(entry for entry in specs(CONFIG.replace(num_local_experts=7)).entries if entry.row.grouped)
    for most_bytes, sizes in [(1, [1] * 7), (299, [2, 2, 2, 1]), (300, [3, 3, 1]), (10**6, [7])]:
        found = list(batches(entry, 700, most_bytes))
        assert [batch.experts for batch, _ in found] == sizes
        assert [keys for batch, _ in found for keys in batch.keys] == list(entry.keys)
        assert all(batch.keys[0] == entry.keys[first] for batch, first in found)


@pytest.mark.parametrize("layout", ["hf", "native", "transformers-v5", "maxtext", "maxtext-unscanned"])
@pytest.mark.parametrize("dtype", ["F8_E4M3", "BF16", "F32"])
def test_an_entry_takes_as_many_bytes_in_every_layout(layout, dtype):
    config = CONFIG.replace(weight_block_size=(7, 16), hidden_size=40, intermediate_size=24)  # grids have a remainder
    sizes = {"F8_E4M3": 1, "BF16": 2, "F32": 4}
    for entry in specs(config).entries:
        held = entry.dtype(dtype if layout in HOLDING_FP8 else "BF16")
        expected = sum(math.prod(spec.shape) * sizes[spec.dtype] for spec in layout_specs(entry, layout, held))
        assert entry.nbytes(held) == expected


def test_block_scales_take_as_many_bytes_grouped_as_published():
    for entry in specs(CONFIG.replace(weight_block_size=(7, 16), hidden_size=40)).entries:
        if entry.row.scaled:
            assert GroupScales(entry=entry, first=0).read_bytes == total_bytes(entry.scale_specs())


# --- config.json -----------------------------------------------------------------------------------------------------


def test_a_folder_without_config_never_asks_the_hub(made, tmp_path, monkeypatch):
    shutil.copytree(made / "hf", tmp_path / "org" / "name")
    shutil.copytree(made / "hf", tmp_path / "name")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)  # importing it would raise
    for folder in ("org/name", "name"):
        (tmp_path / folder / "config.json").unlink()
        with pytest.raises(ConfigError, match="no such file") as caught:
            mj.plan(folder)
        assert caught.value.problems[0].file == folder + "/config.json"


def test_fp8_without_a_block_size_is_refused(made, tmp_path):
    shutil.copytree(made / "hf", tmp_path / "hf")
    folders.edit_json(tmp_path / "hf" / "config.json", quantization_config=None)
    (problem,) = refused(ConfigError, tmp_path / "hf", "without quantization_config")
    assert problem.file == str(tmp_path / "hf" / "config.json")


@pytest.mark.parametrize("value", ["NaN", "1e999", '"\\ud800"', "[Infinity]"])
def test_what_could_not_be_written_again_is_refused_at_once(made, tmp_path, value):
    shutil.copytree(made / "hf", tmp_path / "hf")
    file = tmp_path / "hf" / "config.json"
    file.write_text(file.read_text().replace("{", '{"initializer_range": ' + value + ",", 1))
    (problem,) = refused(ConfigError, tmp_path / "hf", "config.json")
    assert problem.file == str(file)


def test_an_unknown_attribute_is_carried_along_once_it_is_ignored(made, tmp_path):
    shutil.copytree(made / "hf", tmp_path / "hf")
    folders.edit_json(tmp_path / "hf" / "config.json", colour="red")
    (problem,) = refused(ConfigError, tmp_path / "hf", "unknown attribute")
    assert problem.key == "colour"
    mj.convert(tmp_path / "hf", tmp_path / "native", dtype="fp8", ignore=["colour"])
    mj.convert(tmp_path / "native", tmp_path / "back", to="hf-fp8", ignore=["colour"])
    assert json.loads((tmp_path / "back" / "config.json").read_bytes())["colour"] == "red"
    assert mj.verify(tmp_path / "hf", tmp_path / "back", by="bytes", ignore=["colour"]).good


# --- the sidecar -----------------------------------------------------------------------------------------------------


def rewrite(native, change, metadata="same"):
    """Change the tensors of the sidecar, a dict, in place, and perhaps its metadata."""
    file = native / SIDECAR
    tensors = load_file(file)
    change(tensors)
    with file.open("rb") as stream:
        header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
    save_file(tensors, file, header["__metadata__"] if metadata == "same" else metadata)


def nothing(tensors):
    pass


def test_a_damaged_sidecar_is_refused(native):
    file = native / SIDECAR
    file.write_bytes(file.read_bytes()[:-1])
    (problem,) = refused(FormatError, native, "truncated")
    assert problem.file == str(file)


def test_a_sidecar_that_leads_elsewhere_or_nowhere_is_refused(native, tmp_path):
    file = native / SIDECAR
    file.rename(tmp_path / "elsewhere")
    file.symlink_to(tmp_path / "elsewhere")
    assert refused(FormatError, native, "leaves the folder")[0].file == str(file)
    (tmp_path / "elsewhere").unlink()
    assert refused(FormatError, native, "missing")[0].file == str(file)


@pytest.mark.parametrize("shape,dtype", [((2, 1), torch.float32), ((1, 3), torch.float32), ((1, 2), torch.bfloat16)])
def test_scales_that_do_not_fit_are_refused(native, shape, dtype):
    rewrite(native, lambda tensors: tensors.update({QUERY + "_scale_inv": torch.ones(shape, dtype=dtype)}))
    (problem,) = refused(LayoutError, native, "wrong scales in the sidecar")
    assert problem.key == QUERY + "_scale_inv" and problem.file == str(native / SIDECAR)
    assert problem.expected == "F32 [1, 2]"


@pytest.mark.parametrize("key", ["colour", "model.norm.weight_scale_inv", DOWN, "model.layers.1" + DOWN[14:]])
def test_unknown_scales_are_refused(native, key):
    rewrite(native, lambda tensors: tensors.update({key: torch.ones(1, 1)}))
    (problem,) = refused(LayoutError, native, "unexpected tensor in the sidecar")
    assert problem.key == key and problem.file == str(native / SIDECAR)


@pytest.mark.parametrize(
    "metadata",
    [
        None,
        {"format": "pt"},
        {"quantization_config": "{"},
        {"quantization_config": "[" * 100_000},
        {"quantization_config": "null"},
        {"quantization_config": "7"},
        {"quantization_config": "{}"},
        {"quantization_config": '{"quant_method": "awq", "weight_block_size": [128, 128]}'},
    ],
)
def test_a_sidecar_without_block_size_is_refused(native, metadata):
    rewrite(native, nothing, metadata)
    problems = refused(FormatError, native, "quantization_config|block size|quant_method|weight_block_size")
    assert {problem.file for problem in problems} == {str(native / SIDECAR)}


def test_a_sidecar_of_another_block_size_than_the_config_is_refused(native):
    folders.edit_json(
        native / "config.json", quantization_config={"quant_method": "fp8", "weight_block_size": [64, 64]}
    )
    (problem,) = refused(FormatError, native, "another block size")
    assert (problem.expected, problem.got) == ("(64, 64)", "(128, 128)")


def test_a_sidecar_beside_fp8_is_refused(made, tmp_path):
    # Which scales would count: these, or those of the weights?
    shutil.copytree(made / "fp8", tmp_path / "fp8")
    shutil.copy(made / "native" / SIDECAR, tmp_path / "fp8")
    problems = refused(LayoutError, tmp_path / "fp8", "has its own")
    assert {problem.key for problem in problems} == set(load_file(made / "native" / SIDECAR))


def test_all_that_is_wrong_with_a_sidecar_is_told_at_once(native):
    def change(tensors):
        tensors |= {"colour": torch.ones(1), QUERY + "_scale_inv": torch.ones(3, 3)}

    rewrite(native, change)
    assert len(refused(LayoutError, native, "2 problems")) == 2


def test_weights_missing_from_the_sidecar_get_fresh_scales(native, made, tmp_path):
    rewrite(native, lambda tensors: tensors.pop(DOWN + "_scale_inv"))
    report = mj.convert(native, tmp_path / "out", to="hf-fp8")
    moe = "model.layers.0.block_sparse_moe.experts."
    assert report.fresh_scales == tuple(f"{moe}{expert}.w2.weight" for expert in range(3))
    got, was = folders.stored(tmp_path / "out"), folders.stored(made / "hf")
    assert {key for key in was if got[key] != was[key]} <= {
        f"{moe}{expert}.w2.weight{end}" for expert in range(3) for end in ("", "_scale_inv")
    }
