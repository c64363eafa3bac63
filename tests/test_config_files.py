"""Files that `MiniMaxConfig.from_pretrained` reads: folders, hostile files, and the cache of the hub."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from config_cases import LEGACY, PUBLISHED, problems_of, write_config

from minimax_jax import ConfigError, MiniMaxConfig


def test_a_folder_and_the_file_in_it(tmp_path):
    write_config(tmp_path, LEGACY)
    for path in (tmp_path, str(tmp_path), tmp_path / "config.json", str(tmp_path / "config.json")):
        assert MiniMaxConfig.from_pretrained(path) == PUBLISHED


def test_a_relative_path_that_looks_like_a_hub_name(tmp_path, monkeypatch):
    (tmp_path / "checkpoint").mkdir()
    write_config(tmp_path / "checkpoint", LEGACY)
    monkeypatch.chdir(tmp_path)
    assert MiniMaxConfig.from_pretrained("checkpoint/config.json") == PUBLISHED


def test_problems_in_a_file_name_it(tmp_path):
    with pytest.raises(ConfigError) as caught:
        MiniMaxConfig.from_pretrained(write_config(tmp_path, {}))
    assert {problem.file for problem in caught.value.problems} == {str(tmp_path / "config.json")}


def test_ignore_reaches_a_file(tmp_path):
    write_config(tmp_path, LEGACY | {"surprise": 1})
    assert MiniMaxConfig.from_pretrained(tmp_path, ignore=["surprise"]) == PUBLISHED


@pytest.mark.parametrize(
    ("text", "got"),
    [
        ("", "Expecting value"),
        ("{", "Expecting property name"),
        ("{} {}", "Extra data"),
        ('{"rope_theta": NaN}', "NaN is not JSON"),
        ('{"rope_theta": -Infinity}', "-Infinity is not JSON"),
        ('{"hidden_size": 1, "hidden_size": 2}', "named twice: 'hidden_size'"),
        ("[" * 100_000, "recursion"),
        ('{"a":' * 100_000, "recursion"),
        ('{"hidden_size": ' + "9" * 5000 + "}", "4300 digits"),
        (" " * (2**24 + 1), "more than 16777216 bytes"),
    ],
    ids=lambda value: value[:20],
)
def test_files_that_are_not_json(tmp_path, text, got):
    with pytest.raises(ConfigError) as caught:
        MiniMaxConfig.from_pretrained(write_config(tmp_path, text))
    (problem,) = caught.value.problems
    assert problem.what == "config.json cannot be read"
    assert problem.file == str(tmp_path / "config.json")
    assert got in problem.got


def test_files_that_are_not_utf8(tmp_path):
    (tmp_path / "config.json").write_bytes(b'{"a": "\xff"}')
    with pytest.raises(ConfigError, match="cannot be read"):
        MiniMaxConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize(("text", "got"), [("[]", "list"), ("null", "NoneType"), ('"x"', "str"), ("1e400", "float")])
def test_json_that_is_no_object(tmp_path, text, got):
    with pytest.raises(ConfigError) as caught:
        MiniMaxConfig.from_pretrained(write_config(tmp_path, text))
    (problem,) = caught.value.problems
    assert (problem.what, problem.got) == ("config.json is not a JSON object", got)


def test_numbers_too_large_for_a_float(tmp_path):
    text = json.dumps(LEGACY).replace("1e-06", "1e400").replace("0.02", "1e400")
    with pytest.raises(ConfigError) as caught:
        MiniMaxConfig.from_pretrained(write_config(tmp_path, text))
    assert [problem.key for problem in caught.value.problems] == ["rms_norm_eps", "initializer_range"]


def test_deep_values_are_refused_in_few_words(tmp_path):
    deep = json.dumps(LEGACY)[:-1] + ', "surprise": ' + "[" * 400 + "]" * 400 + "}"
    with pytest.raises(ConfigError) as caught:
        MiniMaxConfig.from_pretrained(write_config(tmp_path, deep))
    assert {problem.key for problem in caught.value.problems} == {"surprise"}
    assert len(str(caught.value)) < 1000


def test_names_in_messages_are_printable_and_short():
    problems = problems_of(LEGACY | {"\x1b[2J": 1, "n" * 10_000: 1})
    assert all(problem.key.isprintable() and len(problem.key) < 100 for problem in problems)


@pytest.mark.parametrize("name", ["nowhere", "a/b/c", "/nowhere/at/all", "./nowhere", "../a/b"])
def test_a_path_that_does_not_exist(name):
    with pytest.raises(ConfigError) as caught:
        MiniMaxConfig.from_pretrained(name)
    (problem,) = caught.value.problems
    assert (problem.what, problem.file) == ("no such file", str(Path(name)))
    assert problem.remedy is not None


def test_a_folder_without_a_config_is_not_looked_for_on_the_hub(tmp_path, monkeypatch):
    (tmp_path / "org" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError) as caught:
        MiniMaxConfig.from_pretrained("org/name")
    (problem,) = caught.value.problems
    assert (problem.what, problem.file) == ("no such file", "org/name/config.json")


def test_a_config_that_is_no_regular_file(tmp_path):
    (tmp_path / "config.json").mkdir()
    with pytest.raises(ConfigError, match="not a regular file"):
        MiniMaxConfig.from_pretrained(tmp_path)


# ---- the hub


@pytest.fixture
def hub_cache(tmp_path, monkeypatch):
    """A local hub cache, and no network."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path


def fill(cache, repository, raw):
    """Lay `raw` out as the hub client does: refs name a commit, whose snapshot links to blobs."""
    folder, commit = cache / ("models--" + repository.replace("/", "--")), "0" * 40
    for name in ("refs", "blobs", f"snapshots/{commit}"):
        (folder / name).mkdir(parents=True)
    (folder / "refs/main").write_text(commit)
    (folder / "blobs/abc").write_text(json.dumps(raw))
    (folder / f"snapshots/{commit}/config.json").symlink_to("../../blobs/abc")
    return folder / f"snapshots/{commit}/config.json"


def test_a_hub_name_is_found_in_the_cache(hub_cache):
    fill(hub_cache, "MiniMaxAI/MiniMax-M2", LEGACY)
    assert MiniMaxConfig.from_pretrained("MiniMaxAI/MiniMax-M2") == PUBLISHED


def test_the_environment_says_where_the_cache_is(tmp_path):
    fill(tmp_path / "hub", "org/name", LEGACY)
    environment = {**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    environment.pop("HF_HUB_CACHE", None)
    script = "import minimax_jax as mj; print(mj.MiniMaxConfig.from_pretrained('org/name'))"
    result = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == str(PUBLISHED)


def test_problems_in_a_cached_config_name_its_file(hub_cache):
    file = fill(hub_cache, "org/name", LEGACY | {"scoring_func": "softmax"})
    with pytest.raises(ConfigError) as caught:
        MiniMaxConfig.from_pretrained("org/name")
    assert caught.value.problems[0].file == str(file)


@pytest.mark.parametrize("name", ["org/absent", "or g/na!me", "org/" + "n" * 200])
def test_a_hub_name_that_is_not_there(hub_cache, name):
    with pytest.raises(ConfigError) as caught:
        MiniMaxConfig.from_pretrained(name)
    (problem,) = caught.value.problems
    assert problem.what == "neither a local folder nor a hub repository that can be reached"
    assert problem.file == name
    assert "org/name" in problem.remedy


def test_a_hub_name_without_the_client(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ConfigError) as caught:
        MiniMaxConfig.from_pretrained("org/name")
    (problem,) = caught.value.problems
    assert (problem.what, problem.file) == ("no such folder", "org/name")
    assert "minimax_jax[hub]" in problem.remedy


def test_local_files_need_no_client(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert MiniMaxConfig.from_pretrained(write_config(tmp_path, LEGACY)) == PUBLISHED
