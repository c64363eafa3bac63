"""Conversions to further layouts and from them, out of core: judged by transformers, by Orbax, and by plain numpy."""

import json

import folders
import numpy as np
import orbax.checkpoint as ocp
import pytest
import torch
import transformers
from helpers import BF16, config, differences, random_hf
from layout_cases import WANT as TREES
from orbax.checkpoint import v1
from safetensors.torch import load_file

import minimax_jax as mj
from minimax_jax.errors import JobError, LayoutError
from minimax_jax.jobs import orbax_plan
from minimax_jax.jobs import plan as planning
from minimax_jax.jobs.orbax import read

CONFIG = config(num_hidden_layers=3, num_local_experts=4)
FURTHER = ("transformers-v5", "maxtext", "maxtext-unscanned")


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """The FP8 checkpoint that the trees of the other test file are made from."""
    return folders.write(tmp_path_factory.mktemp("source") / "hf", random_hf(CONFIG), CONFIG)


@pytest.fixture(scope="module")
def made(source, tmp_path_factory):
    """The source in each further layout, in bfloat16."""
    root = tmp_path_factory.mktemp("made")
    for layout in FURTHER:
        mj.convert(source, root / layout, to=layout)
    mj.convert(source, root / "hf", to="hf")
    return root


def stored(folder):
    """Names and arrays as the safetensors library or Orbax reads them; of nested trees, names with dots."""
    if (folder / "_CHECKPOINT_METADATA").exists():
        return mj.flatten(v1.load(folder))
    return folders.arrays(folder)


@pytest.mark.parametrize("layout", FURTHER)
def test_what_is_written_is_what_plain_numpy_makes(made, layout):
    assert differences(stored(made / layout), TREES[layout]) == []


@pytest.mark.parametrize("layout", FURTHER)
def test_it_is_recognised_and_is_the_same_checkpoint(source, made, layout):
    assert mj.inspect(made / layout).layout == layout
    assert mj.verify(made / layout, made / "hf", by="bytes").good
    assert mj.verify(source, made / layout).good


@pytest.mark.parametrize("layout", FURTHER)
@pytest.mark.parametrize("to", ["native", "hf", "orbax", "transformers-v5", "maxtext"])
def test_it_is_a_source_for_everything(source, made, tmp_path, layout, to):
    mj.convert(made / layout, tmp_path / "out", to=to)
    want = made / to if (made / to).exists() else tmp_path / "want"
    if not want.exists():
        mj.convert(source, want, to=to)
    assert differences(stored(tmp_path / "out"), stored(want)) == []


@pytest.mark.parametrize("layout", FURTHER)
def test_small_units_and_chunks_give_the_same(source, made, tmp_path, monkeypatch, layout):
    monkeypatch.setattr("minimax_jax.io.orbax_rows.CHUNK_BYTES", 4_000)
    monkeypatch.setattr(orbax_plan, "_UNIT_BYTES", 1)
    monkeypatch.setattr(planning, "_UNIT_BYTES", 10_000)
    monkeypatch.setattr(planning, "LEAST_UNIT_BYTES", 10_000)
    mj.convert(source, tmp_path / "out", to=layout, workers=4)
    assert differences(stored(tmp_path / "out"), TREES[layout]) == []
    mj.convert(tmp_path / "out", tmp_path / "hf", to="hf", workers=4)
    assert folders.stored(tmp_path / "hf") == folders.stored(made / "hf")


def test_maxtext_restores_it_as_it_restores_its_own(made):
    """The call of MaxText's `load_params_from_path`, for params of another dtype as it has for training."""
    folder = made / "maxtext"
    (item,) = (metadata.parent for metadata in folder.glob("*/_METADATA"))
    like = mj.nest({name: np.zeros(array.shape, np.float32) for name, array in TREES["maxtext"].items()})["params"]
    handler = ocp.PyTreeCheckpointHandler(use_ocdbt=False, use_zarr3=False)
    restored = ocp.Checkpointer(handler).restore(
        item.absolute(),
        item={"params": like},
        transforms={},
        restore_args={"params": ocp.checkpoint_utils.construct_restore_args(like)},
    )
    got = {name: np.asarray(array) for name, array in mj.flatten(restored).items()}
    want = {name: array.astype(np.float32) for name, array in TREES["maxtext"].items()}
    assert differences(got, want) == []


def test_a_stack_is_stored_by_layer_and_expert(made):
    arrays = next((made / "maxtext").glob("*/_METADATA")).parent
    for name in ("wi_0", "wi_1", "wo"):
        chunks = json.loads((arrays / f"params.params.decoder.layers.moe_block.{name}" / ".zarray").read_bytes())
        assert chunks["chunks"][1] == 1


def test_transformers_loads_the_fused_tree_strictly_and_computes_what_it_did(made):
    """The safetensors library reads it, the module takes it without a word about any name."""
    folder, ids = made / "transformers-v5", torch.arange(20).reshape(2, 10)
    model = transformers.MiniMaxM2ForCausalLM(transformers.MiniMaxM2Config.from_pretrained(folder))
    tree = {name: tensor for file in folders.weight_files(folder) for name, tensor in load_file(file).items()}
    model.load_state_dict(tree, strict=True)
    published = transformers.AutoModelForCausalLM.from_pretrained(made / "hf", dtype=torch.float32)
    loaded, report = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    assert {name: list(found) for name, found in report.items() if found} == {}
    with torch.no_grad():
        want = published.eval()(ids).logits
        assert torch.equal(model.eval()(ids).logits, want)
        assert torch.equal(loaded.eval()(ids).logits, want)


def test_fp8_stays_fp8_in_the_fused_tree_and_comes_back_byte_for_byte(source, tmp_path):
    mj.convert(source, tmp_path / "fused", to="transformers-v5", dtype="fp8")
    tree = stored(tmp_path / "fused")
    assert tree["model.layers.0.mlp.experts.gate_up_proj"].dtype.itemsize == 1
    assert tree["model.layers.0.mlp.experts.gate_up_proj_scale_inv"].shape == (4, 2 * 2, 3)
    mj.convert(tmp_path / "fused", tmp_path / "back", to="hf-fp8")
    assert folders.stored(tmp_path / "back") == folders.stored(source)


def test_a_stopped_conversion_goes_on(source, made, tmp_path, monkeypatch):
    monkeypatch.setattr(planning, "_UNIT_BYTES", 2**16)

    def stop(moment):
        if moment.done_bytes > moment.total_bytes // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        mj.convert(source, tmp_path / "out", to="transformers-v5", progress=stop)
    mj.convert(source, tmp_path / "out", to="transformers-v5")
    assert folders.stored(tmp_path / "out") == folders.stored(made / "transformers-v5")


def test_layers_of_several_dtypes_are_not_stacked(source, tmp_path):
    arrays = folders.arrays(source)
    key = "model.layers.1.input_layernorm.weight"
    arrays[key] = arrays[key].astype(np.float32)
    mixed = folders.write(tmp_path / "mixed", arrays, CONFIG)
    with pytest.raises(LayoutError, match="layers differ in dtype") as caught:
        mj.convert(mixed, tmp_path / "out", to="maxtext")
    told = {(problem.key.rsplit(".", 2)[1], problem.expected, problem.got) for problem in caught.value.problems}
    assert ("pre_self_attention_layer_norm", "BF16", "F32") in told and not (tmp_path / "out").exists()
    mj.convert(mixed, tmp_path / "apart", to="maxtext-unscanned")
    assert mj.verify(mixed, tmp_path / "apart").good


def test_maxtext_refuses_fp8(source, tmp_path):
    with pytest.raises(JobError, match="no place for FP8"):
        mj.convert(source, tmp_path / "out", to="maxtext", dtype="fp8")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("layout", FURTHER)
def test_what_takes_the_tables_own_layouts_alone_says_so(made, layout):
    with pytest.raises(LayoutError, match="convert it to native first"):
        mj.load(made / layout)
    if layout != "transformers-v5":
        with pytest.raises(LayoutError, match="not a native tree"):
            read(made / layout)


def test_a_tree_in_memory_is_the_same(made):
    tree = mj.read_tree(made / "transformers-v5")
    native = mj.from_layout(tree, CONFIG, layout="transformers-v5")
    assert {leaf.dtype for name, leaf in native.items() if "experts" in name} == {BF16}
    assert differences(mj.to_hf(native, CONFIG), stored(made / "hf")) == []
