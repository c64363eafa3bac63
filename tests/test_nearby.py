"""A path that is not there: the one that may have been meant is told, in the library and on the command line."""

import json
from pathlib import Path

import pytest
from command_line import run

import minimax_jax as mj
from minimax_jax import nearby
from minimax_jax.nearby import did_you_mean


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    mj.synthesize("MiniMax-M2")
    (tmp_path / "out").mkdir()
    return tmp_path


@pytest.mark.parametrize(
    ("asked", "meant"),
    [
        ("MiniMax-M3", "MiniMax-M2"),
        ("minimax-m2", "MiniMax-M2"),
        ("./MiniMaxM2", "MiniMax-M2"),
        ("MiniMxa-M2/model.safetensors", "MiniMax-M2/model.safetensors"),
        ("MiniMax-M2/model.safetensor", "MiniMax-M2/model.safetensors"),
        ("MiniMax-M3/other", None),
        ("elsewhere", None),
        ("a/b/c", None),
        ("MiniMax-M2", None),
    ],
)
def test_a_name_like_it_is_told_if_all_of_the_path_is_there(home, asked, meant):
    for folder in (Path(), home):
        assert did_you_mean(folder / asked) == (None if meant is None else f"did you mean {folder / meant}?")


@pytest.mark.parametrize(
    ("arguments", "meant"),
    [
        (["inspect", "MiniMax-M3"], "MiniMax-M2"),
        (["convert", "MiniMax-M3", "m2-native"], "MiniMax-M2"),
        (["verify", "MiniMax-M2", "MiniMaxM2"], "MiniMax-M2"),
        (["verify", "MiniMax-M2", "--certificate", "MiniMax-M2/confg.json"], "MiniMax-M2/config.json"),
        (["generate", "MiniMaxM2", "--prompt-ids", "1"], "MiniMax-M2"),
        (["report", "MiniMax-M2", "-o", "uot/report.html"], "out"),
        (["push", "MiniMaxM2", "hf://org/name"], "MiniMax-M2"),
    ],
)
def test_commands_tell_what_may_have_been_meant(home, arguments, meant):
    _, stderr = run(*arguments, code=3)
    assert f"did you mean {meant}?" in stderr


def test_the_library_tells_what_may_have_been_meant(home):
    for use in (mj.inspect, mj.read_tree, mj.load, mj.MiniMaxConfig.from_pretrained):
        with pytest.raises(mj.CheckpointError) as told:
            use(home / "MiniMaxM2")
        assert f"did you mean {home / 'MiniMax-M2'}?" in str(told.value)


def test_a_missing_file_within_a_checkpoint_is_not_taken_for_its_neighbour(home):
    folder = home / "MiniMax-M2"
    index = {"metadata": {}, "weight_map": {"a": "model-1-of-2.safetensors", "b": "model-2-of-2.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "model.safetensors").rename(folder / "model-1-of-2.safetensors")
    with pytest.raises(mj.CheckpointError, match="model-2-of-2") as told:
        mj.inspect("MiniMax-M2")
    assert "did you mean" not in str(told.value)


def test_of_a_huge_folder_not_all_names_are_looked_at(tmp_path):
    for n in range(nearby._MOST_NAMES + 10):
        (tmp_path / f"checkpoint-{n}").touch()
    assert len(nearby._names(tmp_path)) == nearby._MOST_NAMES
    assert did_you_mean(tmp_path / "checkpont-7").startswith("did you mean")


@pytest.mark.parametrize("text", ["", '{"hidden_size": 25', "[]", "null", '{"a": 1, "a": 2}', "\x00"])
def test_a_damaged_config_says_where_to_take_it_from(home, text):
    (home / "MiniMax-M2" / "config.json").write_text(text)
    with pytest.raises(mj.ConfigError) as told:
        mj.inspect("MiniMax-M2")
    (problem,) = told.value.problems
    assert problem.file == "MiniMax-M2/config.json" and "hf download" in problem.remedy
