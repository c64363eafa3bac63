"""A checkpoint on a web server is the same as on disk."""

import subprocess
import sys
from pathlib import Path

import folders
import pytest
from raw_safetensors import write_file
from remote_cases import read_all
from servers import Faults, serving

import minimax_jax as mj
from minimax_jax.errors import ConfigError, FormatError
from minimax_jax.io.beside import side_files
from minimax_jax.io.location import Url, locate

# --- the same as on disk ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "options"), [("hf", {}), ("hf", {"dtype": "fp8"}), ("native", {"to": "hf-fp8"})])
def test_a_conversion_is_that_of_the_folder_byte_for_byte(served, web, tmp_path, name, options):
    mj.convert(served / name, tmp_path / "near", **options)
    mj.convert(f"{web.url}/{name}", tmp_path / "far", **options)
    assert folders.files(tmp_path / "far") == folders.files(tmp_path / "near")
    assert "tokenizer.json" in folders.files(tmp_path / "far")


def test_inspect_plan_verify_and_read_tree_take_a_url(served, web):
    url = f"{web.url}/hf/"
    assert mj.inspect(url).by_dtype == mj.inspect(served / "hf").by_dtype
    assert str(mj.inspect(url).path) == f"{web.url}/hf"
    assert mj.plan(url).shards == mj.plan(served / "hf").shards
    seen = mj.verify(url, served / "native")
    assert seen.good and seen.checkpoints[0].sha256 == mj.verify(served / "hf").checkpoints[0].sha256
    far, near = mj.read_tree(url), mj.read_tree(served / "hf")
    assert folders.described(far) == folders.described(near)
    assert not any(tensor.flags.writeable for tensor in far.values())


@pytest.mark.parametrize("name", ["hf/model.safetensors.index.json", "native/model.safetensors"])
def test_an_index_or_a_file_may_be_named(served, web, name):
    assert mj.inspect(f"{web.url}/{name}").total == mj.inspect(served / name).total


def test_the_command_line_takes_a_url(web):
    command = [sys.executable, "-m", "minimax_jax", "inspect", f"{web.url}/hf"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and f"{web.url}/hf: MiniMax-M2" in done.stdout


def test_names_with_odd_characters_are_found(tmp_path):
    write_file(tmp_path / "a b?c#d%20é.safetensors", x=(3,))
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"x": "a b?c#d%20é.safetensors"}}')
    with serving(tmp_path) as server:
        assert read_all(server) == {"x": bytes(3)}


def test_the_query_of_a_folder_goes_with_each_file_and_is_never_shown(served, web):
    seen = []
    web.faults = Faults(status=lambda path: seen.append(path) or (403 if path.endswith("config.json") else None))
    with pytest.raises(ConfigError) as caught:
        mj.inspect(f"{web.url}/hf?sig=secret")
    assert "secret" not in str(caught.value) and "secret" not in repr(locate(f"{web.url}/hf?sig=secret"))
    assert (locate("https://a/b?sig=secret") / "c").full == "https://a/b/c?sig=secret"


# --- places -----------------------------------------------------------------------------------------------------------


def test_side_files_of_the_usual_names_are_found(served, web):
    found = {file.name for file in side_files(locate(f"{web.url}/hf"))}
    assert found == {file.name for file in side_files(served / "hf")} != set()
    assert side_files(locate(f"{web.url}/native/model.safetensors")) == ()


def test_a_url_given_as_a_path_is_told(tmp_path):
    with pytest.raises(FormatError, match="lost a slash"):
        mj.inspect(Path("s3://bucket/name"))
    assert locate(f"file://{tmp_path}") == tmp_path
    assert locate("a/b") == Path("a/b") and isinstance(locate("HTTPS://a/b/"), Url)


def test_a_password_in_a_url_is_refused_and_not_shown():
    with pytest.raises(FormatError, match="password") as caught:
        mj.inspect("https://me:secret@host/x")
    assert "secret" not in str(caught.value)


def test_an_unknown_kind_of_url():
    with pytest.raises(FormatError, match="unknown kind of URL"):
        mj.inspect("nowhere://x")


@pytest.mark.parametrize(("url", "extra"), [("https://h/x", "remote"), ("s3://b/x", "remote"), ("hf://org/x", "hub")])
def test_what_is_not_installed_is_named(monkeypatch, url, extra):
    for name in ("fsspec", "huggingface_hub"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(FormatError) as caught:
        mj.inspect(url)
    assert f"minimax_jax[{extra}]" in str(caught.value) and url in str(caught.value)
