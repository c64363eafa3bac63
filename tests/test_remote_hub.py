"""A checkpoint in a hub repository, through the real client against a stand-in of the hub on this machine."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import folders
import pytest
from huggingface_hub import ModelCard, constants
from raw_safetensors import write_file
from servers import COMMIT, Faults, HubHandler, serving

import minimax_jax as mj
from minimax_jax import synthetic
from minimax_jax.errors import CheckpointError, ConfigError, FormatError
from minimax_jax.io import hub, remote
from minimax_jax.io.checkpoint import INDEX_NAME, open_checkpoint
from minimax_jax.io.location import locate
from minimax_jax.io.reader import Reader
from minimax_jax.io.shelf import SMALL_BYTES
from minimax_jax.io.source import pin
from minimax_jax.jobs.source import open_source
from minimax_jax.jobs.tensor import describe

REPOSITORY = "hf://org/tiny"


@pytest.fixture(autouse=True)
def hasty(monkeypatch):
    monkeypatch.setattr(remote, "WAITS_SECONDS", (0.0,) * 3)
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # the client's own waits


@pytest.fixture
def at(tmp_path, monkeypatch):
    """Point the client at a server, with an empty cache."""

    def point(server):
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_PROGRESS_BARS", True)
        hub._files_of.cache_clear()
        hub._shelf.cache_clear()
        return server

    return point


@pytest.fixture
def server(served_hf, at):
    with serving(served_hf, HubHandler) as running:
        yield at(running)


def cached(tmp_path):
    """The names of the files in the client's cache, and the bytes of all of them."""
    blobs = (tmp_path / "cache").rglob("blobs/*")
    links = {file.name for file in (tmp_path / "cache").rglob("snapshots/*/*")}
    return links, sum(file.stat().st_size for file in blobs if file.is_file())


@pytest.mark.parametrize("name", [REPOSITORY, f"{REPOSITORY}@main", f"{REPOSITORY}@{COMMIT}", f"{REPOSITORY}?keep=0"])
def test_a_conversion_from_the_hub_is_that_of_the_folder_byte_for_byte(served_hf, server, tmp_path, name):
    mj.convert(served_hf, tmp_path / "near")
    mj.convert(name, tmp_path / "far")
    assert folders.converted(tmp_path / "far") == folders.converted(tmp_path / "near")
    assert "tokenizer.json" in folders.files(tmp_path / "far")
    shards = {file.name for file in folders.weight_files(served_hf)}
    assert cached(tmp_path)[0] == (set() if name.endswith("keep=0") else shards)


def test_shards_are_fetched_once(served_hf, server, tmp_path):
    mj.convert(REPOSITORY, tmp_path / "a")
    sent = server.sent_bytes.total()
    weights = sum(file.stat().st_size for file in folders.weight_files(served_hf))
    assert sent < 2.1 * weights  # and the headers, here as long as the block in which they are read
    server.requests.clear()
    mj.convert(REPOSITORY, tmp_path / "b")
    assert server.asked() == []


def test_inspect_reads_headers_only(at, tmp_path):
    config = synthetic.config(real=True, layers=1, experts=8)
    synthetic.synthesize(tmp_path / "hf", config, sparse=True, shard_bytes=50_000_000)
    near = mj.inspect(tmp_path / "hf")
    with serving(tmp_path / "hf", HubHandler) as running:
        assert mj.inspect(at(running) and REPOSITORY).total == near.total
        assert running.sent_bytes.total() <= near.files * remote.BLOCK_BYTES + 100_000
        assert len(running.asked()) == near.files
    assert cached(tmp_path) == (set(), 0)


def test_the_revision_is_resolved_once(server):
    assert str(mj.inspect(f"{REPOSITORY}@main").path) == f"{REPOSITORY}@{COMMIT}"
    assert all("main" not in path for path in server.requests if "/resolve/" in path)
    asked = [path for path in server.requests if path.startswith("/api/")]
    assert len([path for path in asked if path != "/api/agent-harnesses"]) == 2  # that is the client's own, once a day


def test_cards_name_the_repository_from_step_to_step(server, tmp_path):
    mj.convert(f"{REPOSITORY}@{COMMIT}?keep=0", tmp_path / "native")
    mj.convert(tmp_path / "native", tmp_path / "back", to="hf")
    texts = [(tmp_path / name / "README.md").read_text() for name in ("native", "back")]
    assert [ModelCard(text).data.base_model for text in texts] == ["org/tiny", "org/tiny"]
    assert "made from: a checkpoint in the native layout" in texts[1] and COMMIT not in texts[0]


def test_offline_the_cache_is_the_source(served_hf, server, tmp_path, monkeypatch):
    mj.convert(REPOSITORY, tmp_path / "near")
    mj.MiniMaxConfig.from_pretrained(REPOSITORY)
    for file in served_hf.iterdir():
        hub._download(locate(f"{REPOSITORY}@{COMMIT}/{file.name}"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    server.faults = Faults(status=lambda path: 500)
    mj.convert(f"{REPOSITORY}@{COMMIT}", tmp_path / "far")
    assert folders.converted(tmp_path / "far") == folders.converted(tmp_path / "near")
    with pytest.raises(FormatError, match="hub does not give this"):
        mj.inspect("hf://org/other")


def test_the_config_alone(served_hf, server):
    config = mj.MiniMaxConfig.from_pretrained(served_hf)
    for name in (REPOSITORY, f"{REPOSITORY}@main", "org/tiny"):
        assert mj.MiniMaxConfig.from_pretrained(name) == config
    for name in (f"{REPOSITORY}@other", "hf://org/other"):
        with pytest.raises(ConfigError, match="hub repository"):
            mj.MiniMaxConfig.from_pretrained(name)


def test_folders_that_are_not_taken_along_are_told(served_hf, at, tmp_path):
    shutil.copytree(served_hf, tmp_path / "repository")
    for name in ("figures", ".hidden"):
        (tmp_path / "repository" / name).mkdir()
        (tmp_path / "repository" / name / "a.png").touch()
    with serving(tmp_path / "repository", HubHandler) as running:
        at(running)
        assert [(each.name, each.what) for each in mj.inspect(REPOSITORY).left_behind] == [("figures", "a folder")]


def test_a_sub_folder_or_a_file_of_a_repository(served_hf, at, tmp_path):
    shutil.copytree(served_hf, tmp_path / "repository" / "part")
    with serving(tmp_path / "repository", HubHandler) as running:
        at(running)
        for name in (f"{REPOSITORY}/part", f"{REPOSITORY}@main/part", f"{REPOSITORY}/part/{INDEX_NAME}"):
            assert mj.inspect(name).total == mj.inspect(served_hf).total
        with pytest.raises(FormatError, match="no safetensors file here"):
            mj.inspect(REPOSITORY)


# --- bounded disk -----------------------------------------------------------------------------------------------------


@pytest.fixture
def shards(at, tmp_path):
    """Six shards of which each holds one tensor that is worth fetching and one that is not."""
    folder = tmp_path / "shards"
    folder.mkdir()
    for number in range(6):
        write_file(folder / f"model-{number}.safetensors", **{f"big{number}": (SMALL_BYTES,), f"small{number}": (9,)})
    with serving(folder, HubHandler) as running:
        yield at(running)


def test_at_most_so_many_shards_are_on_disk(shards, tmp_path):
    checkpoint = open_checkpoint(pin(locate(f"{REPOSITORY}?keep=2")))
    size, seen = (shards.folder / "model-0.safetensors").stat().st_size, []
    with Reader(checkpoint) as reader:
        for number in (0, 1, 0, 2, 5, 0):
            assert reader.read(checkpoint.tensors[f"big{number}"]).tobytes() == bytes(SMALL_BYTES)
            names, nbytes = cached(tmp_path)
            assert nbytes == len(names) * size
            seen.append({int(name[6]) for name in names})
    assert seen == [{0}, {0, 1}, {0, 1}, {0, 2}, {2, 5}, {5, 0}]
    assert cached(tmp_path) == (set(), 0)


def test_small_parts_of_a_shard_that_is_not_there_do_not_fetch_it(shards, tmp_path):
    checkpoint = open_checkpoint(pin(locate(f"{REPOSITORY}?keep=2")))
    with Reader(checkpoint) as reader:
        for number in range(6):
            assert reader.read(checkpoint.tensors[f"small{number}"]).tobytes() == b"\1" * 9
        assert cached(tmp_path) == (set(), 0)


def test_shards_that_were_there_before_are_left(shards, tmp_path):
    hub._download(locate(f"{REPOSITORY}@{COMMIT}/model-3.safetensors"))
    checkpoint = open_checkpoint(pin(locate(f"{REPOSITORY}?keep=2")))
    with Reader(checkpoint) as reader:
        for number in range(6):
            reader.read(checkpoint.tensors[f"big{number}"])
    assert cached(tmp_path)[0] == {"model-3.safetensors"}


def test_a_blob_that_another_revision_has_too_is_left(shards, tmp_path):
    url = locate(f"{REPOSITORY}@{COMMIT}/model-3.safetensors")
    path = hub._download(url)
    other = path.parent.parent / ("f" * 40) / path.name
    other.parent.mkdir()
    other.symlink_to(path.readlink())
    hub._delete(path)
    assert not path.exists() and other.read_bytes() == (shards.folder / path.name).read_bytes()


def test_a_conversion_with_few_shards_on_disk(served_hf, server, tmp_path, monkeypatch):
    monkeypatch.setattr("minimax_jax.io.shelf.SMALL_BYTES", 1000)
    mj.convert(served_hf, tmp_path / "near")
    mj.convert(f"{REPOSITORY}?keep=2", tmp_path / "far", workers=3)
    assert folders.converted(tmp_path / "far") == folders.converted(tmp_path / "near")
    assert cached(tmp_path) == (set(), 0)


# --- what goes wrong --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", ["", "?keep=0"])
def test_a_hub_that_is_busy_is_asked_again(served_hf, server, tmp_path, keep):
    busy = iter([503, 500, 429, None] * 4)
    server.faults = Faults(status=lambda path: next(busy, None))
    assert mj.verify(REPOSITORY + keep, served_hf).good


def test_a_hub_that_stays_busy_is_an_error(server):
    server.faults = Faults(status=lambda path: 503)
    with pytest.raises(FormatError, match=r"keeps failing(.|\n)*hf://org/tiny"):
        mj.inspect(REPOSITORY)


@pytest.mark.parametrize("keep", ["", "?keep=0"])
def test_connections_that_break(served_hf, server, keep):
    server.faults = Faults(drop_after=40_000, drops=30)
    assert mj.verify(REPOSITORY + keep, served_hf).good


@pytest.mark.parametrize(
    "name", ["hf://org/other", f"{REPOSITORY}@other", "hf://tiny", f"{REPOSITORY}?keep=1", f"{REPOSITORY}?kept=2"]
)
def test_what_is_not_there_or_makes_no_sense(server, name):
    with pytest.raises(CheckpointError) as caught:
        mj.inspect(name)
    assert name.partition("?")[0] in str(caught.value)


@pytest.mark.parametrize("keep", ["1", "", "two", "-2"])
def test_so_many_shards_cannot_be_kept(server, keep):
    with pytest.raises(FormatError, match="no such number of shards"):
        mj.inspect(f"{REPOSITORY}?keep={keep}")


@pytest.mark.parametrize("status", [401, 403])
def test_a_repository_that_is_not_for_everyone(server, status):
    server.faults = Faults(status=lambda path: status)
    with pytest.raises(FormatError, match="HF_TOKEN"):
        mj.inspect(REPOSITORY)
    assert len([path for path in server.requests if "org/tiny" in path]) == 1  # of the client's own affairs, none


def test_a_mirror_that_ignores_ranges(server):
    server.faults = Faults(ignore_range=True)
    with pytest.raises(FormatError, match="does not send the part"):
        mj.inspect(REPOSITORY)


def test_the_environment_says_where_the_hub_is(served_hf, tmp_path):
    with serving(served_hf, HubHandler) as server:
        known = {"HF_ENDPOINT": server.url, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path), "HF_TOKEN": "hf_secret"}
        command = [sys.executable, "-m", "minimax_jax", "verify", REPOSITORY, str(served_hf), "--json"]
        environment = {name: value for name, value in os.environ.items() if name != "HF_HUB_CACHE"}
        done = subprocess.run(command, env=environment | known, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"{REPOSITORY}@{COMMIT}" in done.stdout and "hf_secret" not in done.stdout + done.stderr
    asked = [headers for path, headers in zip(server.requests, server.headers, strict=True) if "org/tiny" in path]
    assert asked and all(headers["authorization"] == "Bearer hf_secret" for headers in asked)
    assert Path(tmp_path / "hub" / "models--org--tiny").is_dir()


def test_looking_at_one_tensor_fetches_no_shard(served_hf, server, tmp_path):
    key = "model.layers.0.block_sparse_moe.experts.1.w2.weight"
    far, near = (describe(open_source(place), key).whole for place in (REPOSITORY, served_hf))
    assert (far.minimum, far.maximum, far.mean, far.scale_inv) == (
        near.minimum,
        near.maximum,
        near.mean,
        near.scale_inv,
    )
    assert cached(tmp_path)[0] == set()
