"""Names that no file can have: each entry that takes a path refuses them by the same error of the library."""

import pytest
import torch

import minimax_jax as mj
from minimax_jax import demo, synthetic
from minimax_jax.errors import CheckpointError, ConfigError, RequestError
from minimax_jax.io.checkpoint import open_checkpoint
from minimax_jax.io.location import locate
from minimax_jax.jobs import orbax
from minimax_jax.jobs.certified import read_certificate
from minimax_jax.jobs.probe import probe
from minimax_jax.jobs.source import open_source
from torch_bridge import dcp

CONFIG = synthetic.config(layers=1, experts=2)

SOURCES = {
    "open_checkpoint": lambda bad, good: open_checkpoint(locate(bad)),
    "open_source": lambda bad, good: open_source(bad),
    "inspect": lambda bad, good: mj.inspect(bad),
    "plan": lambda bad, good: mj.plan(bad),
    "convert": lambda bad, good: mj.convert(bad, good.parent / "out"),
    "verify": lambda bad, good: mj.verify(bad),
    "verify, second": lambda bad, good: mj.verify(good, bad),
    "diff": lambda bad, good: mj.diff(good, bad),
    "report": lambda bad, good: mj.report(bad, output=good.parent / "page.html"),
    "read_tree": lambda bad, good: mj.read_tree(bad),
    "load": lambda bad, good: mj.load(bad),
    "load_model": lambda bad, good: mj.load_model(bad),
}
LOCAL = {
    "from_pretrained": lambda bad, good: mj.MiniMaxConfig.from_pretrained(bad),
    "push": lambda bad, good: mj.push(bad, "hf://org/name"),
    "convert to": lambda bad, good: mj.convert(good, bad),
    "convert to Orbax": lambda bad, good: mj.convert(good, bad, to="orbax"),
    "convert to DCP": lambda bad, good: mj.convert(good, bad, to="dcp"),
    "synthesize": lambda bad, good: mj.synthesize(bad, CONFIG),
    "save_model": lambda bad, good: mj.save_model(mj.load_model(good, dtype=None), bad),
    "certificate": lambda bad, good: mj.verify(good, output=bad),
    "certificate that is read": lambda bad, good: mj.verify(good, certificate=bad),
    "read_certificate": lambda bad, good: read_certificate(bad),
    "page": lambda bad, good: mj.report(good, output=bad),
    "probe": lambda bad, good: probe(mj.plan(good), bad),
    "demo": lambda bad, good: demo.run(bad, say=print),
    "Orbax read": lambda bad, good: orbax.read(bad),
    "Orbax save": lambda bad, good: orbax.save(mj.from_hf(mj.read_tree(good), CONFIG), CONFIG, bad),
    "DCP load": lambda bad, good: dcp.load({}, bad),
    "DCP save": lambda bad, good: dcp.save({"a": torch.ones(2)}, bad, CONFIG),
}


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    folder = tmp_path_factory.mktemp("good") / "hf"
    mj.synthesize(folder, CONFIG)
    return folder


@pytest.mark.parametrize("name", ["x\0y", "x/\0", "\ud800"], ids=ascii)
@pytest.mark.parametrize("call", [*SOURCES, *LOCAL])
def test_a_name_that_no_file_can_have_is_refused_as_such(good, tmp_path, monkeypatch, call, name):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RequestError, match="no file can have such a name") as caught:
        (SOURCES | LOCAL)[call](name, good)
    assert ascii(name).strip("'") in str(caught.value.problems[0].file) and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("url", ["hf://org/na\0me", "https://127.0.0.1/a\0?secret", "s3://bucket/\0"], ids=ascii)
@pytest.mark.parametrize("call", SOURCES)
def test_so_is_one_in_a_url_before_anything_is_asked_for(good, call, url):
    with pytest.raises(RequestError, match="no file can have such a name") as caught:
        SOURCES[call](url, good)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("call", [*SOURCES, *LOCAL])
def test_a_name_that_is_too_long_is_an_error_of_the_library(good, tmp_path, monkeypatch, call):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError) as caught:
        (SOURCES | LOCAL)[call]("x" * 5000, good)
    assert "x" * 200 in str(caught.value) and list(tmp_path.iterdir()) == []


def test_a_config_by_itself_is_held_to_its_folder_as_elsewhere(good, tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "config.json").symlink_to(good / "config.json")
    with pytest.raises(ConfigError, match="path leaves the folder"):
        mj.MiniMaxConfig.from_pretrained(tmp_path / "in")
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "abc"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    (blobs / "beef").write_bytes((good / "config.json").read_bytes())
    (snapshot / "config.json").symlink_to("../../blobs/beef")
    assert mj.MiniMaxConfig.from_pretrained(snapshot).num_local_experts == 2
