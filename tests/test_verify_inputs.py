"""Verification: which checkpoints may be compared, and with what arguments."""

import json
import shutil

import folders
import pytest

import minimax_jax as mj
from minimax_jax import synthetic
from minimax_jax.errors import FormatError, JobError, LayoutError
from minimax_jax.io.reader import Reader

CONFIG = synthetic.config(layers=1, experts=3)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    root = tmp_path_factory.mktemp("made")
    synthetic.synthesize(root / "hf", CONFIG, shard_bytes=60_000)
    return root


def failed(seen):
    return {comparison.key for comparison in seen.failures}


@pytest.mark.parametrize(
    "changes",
    [
        {"num_local_experts": 4},
        {"num_hidden_layers": 2},
        {"vocab_size": 8},
        {"intermediate_size": 64},
        {"rotary_dim": 32},
        {"rope_theta": 1e4},
        {"rms_norm_eps": 1e-5},
        {"num_experts_per_tok": 1},
        {"tie_word_embeddings": True},
    ],
    ids=str,
)
def test_another_architecture_is_refused_naming_what_differs(made, tmp_path, changes):
    synthetic.synthesize(tmp_path / "other", CONFIG.replace(**changes), sparse=True)
    with pytest.raises(LayoutError, match="not of the same architecture") as caught:
        mj.verify(made / "hf", tmp_path / "other")
    ((name, value),) = changes.items()
    (problem,) = caught.value.problems
    assert (problem.key, problem.got) == (name, str(value)) and problem.file == str(tmp_path / "other")
    assert problem.expected == str(getattr(CONFIG, name))


def test_what_changes_no_result_does_not_matter(made, tmp_path):
    shutil.copytree(made / "hf", tmp_path / "other")
    folders.edit_json(
        tmp_path / "other" / "config.json",
        max_position_embeddings=9,
        dtype="float32",
        torch_dtype=None,
        use_cache=False,
    )
    assert mj.verify(made / "hf", tmp_path / "other", by="bytes").good


def test_names_without_the_prefix_are_refused(made, tmp_path):
    tree = {key.removeprefix("model."): array for key, array in folders.arrays(made / "hf").items()}
    folders.write(tmp_path / "other", tree, CONFIG)
    with pytest.raises(LayoutError, match="not of the same architecture") as caught:
        mj.verify(made / "hf", tmp_path / "other")
    assert caught.value.problems[0].got == "embed_tokens.weight"
    assert mj.verify(tmp_path / "other").checkpoints[0].digests[0].key == "embed_tokens.weight"


def test_each_checkpoint_is_read_in_its_own_blocks(tmp_path):
    # Grids of one shape, blocks of another size: the same bytes are other weights.
    config = synthetic.config(layers=1, experts=2, weight_block_size=(100, 130))
    synthetic.synthesize(tmp_path / "a", config)
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    quantization = json.loads((tmp_path / "a" / "config.json").read_bytes())["quantization_config"]
    quantization["weight_block_size"] = [99, 131]
    folders.edit_json(tmp_path / "b" / "config.json", quantization_config=quantization)
    for path in ("a", "b"):
        mj.convert(tmp_path / path, tmp_path / f"{path}-f32", to="hf", dtype="f32")
        assert mj.verify(tmp_path / path, tmp_path / f"{path}-f32").good
    a, b = (folders.stored(tmp_path / path) for path in ("a-f32", "b-f32"))
    moved = {key for key in a if a[key] != b[key]}
    assert moved and failed(mj.verify(tmp_path / "a", tmp_path / "b")) == moved
    assert failed(mj.verify(tmp_path / "a", tmp_path / "b", by="bytes")) == folders.scaled_weights(tmp_path / "a")


def test_a_file_cut_while_it_is_read_is_found(made, tmp_path, monkeypatch):
    shutil.copytree(made / "hf", tmp_path / "other")
    read = Reader.read

    def read_and_cut(self, info, *rows):
        array = read(self, info, *rows)
        for file in folders.weight_files(tmp_path / "other"):
            with file.open("r+b") as stream:
                stream.truncate(10)
        return array

    monkeypatch.setattr(Reader, "read", read_and_cut)
    with pytest.raises(FormatError, match="truncated"):
        mj.verify(tmp_path / "other", workers=1)


@pytest.mark.parametrize("wrong", [{"by": "byte"}, {"by": None}, {"workers": 0}])
def test_arguments_that_make_no_sense_are_named(made, wrong):
    with pytest.raises(JobError, match=r"no such way|no workers"):
        mj.verify(made / "hf", made / "hf", **wrong)
