"""Servers that fail, and files that change while they are read: an error, or the right bytes."""

import itertools
import shutil

import folders
import pytest
from remote_cases import read_all, serving_large
from servers import Faults, serving

import minimax_jax as mj
from minimax_jax.errors import ConfigError, FormatError
from minimax_jax.io import remote
from minimax_jax.io.checkpoint import open_checkpoint
from minimax_jax.io.location import locate
from minimax_jax.io.reader import Reader


@pytest.fixture(autouse=True)
def hasty(monkeypatch):
    """No test waits."""
    monkeypatch.setattr(remote, "WAITS_SECONDS", (0.0,) * 6)


@pytest.fixture
def large(tmp_path):
    with serving_large(tmp_path) as served:
        yield served


# --- servers that fail ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [500, 503, 429, 408])
def test_a_busy_server_is_asked_again(large, status):
    server, stored = large
    turns = itertools.count()
    server.faults = Faults(status=lambda path: status if next(turns) % 3 else None)
    assert read_all(server) == stored


def test_a_server_that_stays_busy_is_an_error(large):
    server, _ = large
    server.faults = Faults(status=lambda path: 503)
    with pytest.raises(FormatError, match=r"keeps failing(.|\n)*503"):
        read_all(server)
    assert len(server.requests) == len(remote.WAITS_SECONDS) + 1


def test_waits_grow(large, monkeypatch):
    server, _ = large
    waits = []
    monkeypatch.setattr(remote, "WAITS_SECONDS", (1.0, 2.0, 4.0))
    monkeypatch.setattr(remote.time, "sleep", waits.append)
    server.faults = Faults(status=lambda path: 500)
    with pytest.raises(FormatError):
        read_all(server)
    assert [low <= wait <= 2 * low for wait, low in zip(waits, (0.5, 1, 2), strict=True)] == [True] * 3


def test_nobody_at_the_address_is_an_error():
    with pytest.raises(FormatError, match="cannot be reached"):
        mj.inspect("http://127.0.0.1:9/hf")


def test_a_connection_that_breaks_is_taken_up_where_it_broke(large):
    server, stored = large
    checkpoint = open_checkpoint(locate(server.url))
    server.sent_bytes.clear()
    server.faults = Faults(drop_after=100_000)
    with Reader(checkpoint) as reader:
        assert reader.read(checkpoint.tensors["big"]).tobytes() == stored["big"]
    assert server.sent_bytes.total() <= len(stored["big"]) + 1


def test_a_connection_that_never_gets_anywhere_is_an_error(large):
    server, _ = large
    checkpoint = open_checkpoint(locate(server.url))
    server.faults = Faults(drop_after=0)
    with pytest.raises(FormatError, match="keeps failing"), Reader(checkpoint) as reader:
        reader.read(checkpoint.tensors["big"])


def test_a_conversion_over_a_connection_that_keeps_breaking(served, web, tmp_path):
    mj.convert(served / "hf", tmp_path / "near")
    web.faults = Faults(drop_after=9_999)
    mj.convert(f"{web.url}/hf", tmp_path / "far")
    assert folders.files(tmp_path / "far") == folders.files(tmp_path / "near")


@pytest.mark.parametrize("status", [400, 401, 403, 404, 410, 416])
def test_a_refusal_names_the_url_and_is_not_repeated(served, web, status):
    web.faults = Faults(status=lambda path: status if path.endswith(".safetensors") else None)
    with pytest.raises(FormatError) as caught:
        mj.inspect(f"{web.url}/hf")
    files = {problem.file for problem in caught.value.problems}
    assert f"{web.url}/hf/{folders.weight_files(served / 'hf')[0].name}" in files
    assert len(web.asked()) == len(set(web.asked())) == len(files)
    assert status in (404, 410) or all(problem.remedy for problem in caught.value.problems)


def test_a_config_that_is_not_there(served, web, tmp_path):
    shutil.copytree(served / "hf", tmp_path / "hf")
    (tmp_path / "hf" / "config.json").unlink()
    with serving(tmp_path) as server, pytest.raises(ConfigError, match=r"No such file(.|\n)*|config\.json"):
        mj.inspect(f"{server.url}/hf")


def test_a_folder_without_weights(tmp_path):
    with serving(tmp_path) as server, pytest.raises(FormatError, match="no safetensors file here"):
        mj.inspect(server.url)


@pytest.mark.parametrize(
    "faults",
    [
        Faults(ignore_range=True),
        Faults(shift=1),
        Faults(headers={"Content-Encoding": "gzip"}),
        Faults(headers={"Content-Range": "bytes */9999999"}),
        Faults(headers={"Content-Range": "bytes 0-0/*"}),
        Faults(headers={"Content-Range": "pages 0-0/9999999"}),
    ],
)
def test_another_part_than_was_asked_for_is_never_taken(large, faults):
    server, _ = large
    server.faults = faults
    with pytest.raises(FormatError, match="does not send the part"):
        read_all(server)


def test_the_whole_file_in_place_of_a_part_is_not_read(large):
    server, _ = large
    checkpoint = open_checkpoint(locate(server.url))
    server.faults = Faults(ignore_range=True)
    server.requests.clear()
    with pytest.raises(FormatError, match="does not send the part"), Reader(checkpoint) as reader:
        reader.read(checkpoint.tensors["big"])
    assert len(server.asked()) == 1


# --- files that change ------------------------------------------------------------------------------------------------


def test_a_file_replaced_before_it_is_read(large, tmp_path):
    server, _ = large
    checkpoint = open_checkpoint(locate(server.url))
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\xff")
    with pytest.raises(FormatError, match="changed or replaced"), Reader(checkpoint) as reader:
        reader.read(checkpoint.tensors["a"])


def test_a_file_replaced_after_it_was_read(large, tmp_path):
    server, _ = large
    checkpoint = open_checkpoint(locate(server.url))
    file = tmp_path / "model.safetensors"
    with pytest.raises(FormatError, match="changed or replaced"), Reader(checkpoint) as reader:
        reader.read(checkpoint.tensors["big"])
        file.write_bytes(file.read_bytes()[:-1] + b"\xff")


@pytest.mark.parametrize(
    ("change", "match"),
    [(lambda file: file.write_bytes(file.read_bytes()[:-1]), "truncated"), (lambda file: file.unlink(), "gone")],
)
def test_a_file_that_is_shorter_or_gone_at_the_end(large, tmp_path, change, match):
    server, _ = large
    checkpoint = open_checkpoint(locate(server.url))
    with pytest.raises(FormatError, match=match), Reader(checkpoint) as reader:
        reader.read(checkpoint.tensors["big"])
        change(tmp_path / "model.safetensors")


def test_a_conversion_of_files_that_change_leaves_nothing(web, tmp_path):
    mj.inspect(f"{web.url}/hf")
    opening = len([path for path in web.asked() if "source_scales" not in path])
    turns = itertools.count()
    web.faults = Faults(etag=lambda: "new" if next(turns) >= opening + 3 else "old")
    with pytest.raises(FormatError, match="changed or replaced"):
        mj.convert(f"{web.url}/hf", tmp_path / "out")
    assert next(turns) > opening + 3 and not (tmp_path / "out").exists()
