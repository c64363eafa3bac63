"""A checkpoint on a web server: the same as on disk, in few requests, and never anything but its bytes."""

import itertools
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import folders
import numpy as np
import pytest
from raw_safetensors import write_file, write_index
from servers import Faults, serving

import minimax_jax as mj
from minimax_jax import synthetic
from minimax_jax.errors import ConfigError, FormatError
from minimax_jax.io import remote
from minimax_jax.io.checkpoint import open_checkpoint, side_files
from minimax_jax.io.location import Url, locate
from minimax_jax.io.reader import Reader


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A checkpoint in several files, one converted from it with a sidecar, and that as one file."""
    root = tmp_path_factory.mktemp("made")
    synthetic.synthesize(root / "hf", synthetic.config(layers=1, experts=3), shard_bytes=60_000)
    mj.convert(root / "hf", root / "native")
    return root


@pytest.fixture
def web(made):
    with serving(made) as server:
        yield server


@pytest.fixture(autouse=True)
def hasty(monkeypatch):
    """No test waits."""
    monkeypatch.setattr(remote, "WAITS_SECONDS", (0.0,) * 6)


@pytest.fixture
def large(tmp_path):
    """A file with a tensor of many blocks, small ones around it, and the checkpoint's bytes by key."""
    write_file(tmp_path / "model.safetensors", a=(7,), b=(1000, 3), big=(5 * remote.BLOCK_BYTES + 11,), c=(50,))
    with serving(tmp_path) as server:
        yield server, {key: data for key, (_, _, data) in folders.stored(tmp_path).items()}


def read_all(server):
    checkpoint = open_checkpoint(locate(server.url))
    with Reader(checkpoint) as reader:
        return {key: reader.read(info).tobytes() for key, info in checkpoint.tensors.items()}


# --- the same as on disk ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "options"), [("hf", {}), ("hf", {"dtype": "fp8"}), ("native", {"to": "hf-fp8"})])
def test_a_conversion_is_that_of_the_folder_byte_for_byte(made, web, tmp_path, name, options):
    mj.convert(made / name, tmp_path / "near", **options)
    mj.convert(f"{web.url}/{name}", tmp_path / "far", **options)
    assert folders.files(tmp_path / "far") == folders.files(tmp_path / "near")
    assert "tokenizer.json" in folders.files(tmp_path / "far")


def test_inspect_plan_verify_and_read_tree_take_a_url(made, web):
    url = f"{web.url}/hf/"
    assert mj.inspect(url).by_dtype == mj.inspect(made / "hf").by_dtype
    assert str(mj.inspect(url).path) == f"{web.url}/hf"
    assert mj.plan(url).shards == mj.plan(made / "hf").shards
    seen = mj.verify(url, made / "native")
    assert seen.good and seen.checkpoints[0].sha256 == mj.verify(made / "hf").checkpoints[0].sha256
    far, near = mj.read_tree(url), mj.read_tree(made / "hf")
    assert folders.described(far) == folders.described(near)
    assert not any(tensor.flags.writeable for tensor in far.values())


@pytest.mark.parametrize("name", ["hf/model.safetensors.index.json", "native/model.safetensors"])
def test_an_index_or_a_file_may_be_named(made, web, name):
    assert mj.inspect(f"{web.url}/{name}").total == mj.inspect(made / name).total


def test_the_command_line_takes_a_url(web):
    command = [sys.executable, "-m", "minimax_jax", "inspect", f"{web.url}/hf"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and f"{web.url}/hf: MiniMax-M2" in done.stdout


def test_names_with_odd_characters_are_found(tmp_path):
    write_file(tmp_path / "a b?c#d%20é.safetensors", x=(3,))
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"x": "a b?c#d%20é.safetensors"}}')
    with serving(tmp_path) as server:
        assert read_all(server) == {"x": bytes(3)}


def test_the_query_of_a_folder_goes_with_each_file_and_is_never_shown(made, web):
    seen = []
    web.faults = Faults(status=lambda path: seen.append(path) or (403 if path.endswith("config.json") else None))
    with pytest.raises(ConfigError) as caught:
        mj.inspect(f"{web.url}/hf?sig=secret")
    assert "secret" not in str(caught.value) and "secret" not in repr(locate(f"{web.url}/hf?sig=secret"))
    assert (locate("https://a/b?sig=secret") / "c").full == "https://a/b/c?sig=secret"


# --- how much is asked for --------------------------------------------------------------------------------------------


def test_inspect_reads_headers_only(tmp_path):
    config = synthetic.config(real=True, layers=1, experts=8)
    synthetic.synthesize(tmp_path / "hf", config, sparse=True, shard_bytes=50_000_000)
    near = mj.inspect(tmp_path / "hf")
    assert near.total.nbytes > 1_000_000_000 and near.files > 3
    with serving(tmp_path) as server:
        assert mj.inspect(f"{server.url}/hf").total == near.total
        assert server.sent_bytes.total() < (near.files + 1) * (remote.BLOCK_BYTES + 1)
        assert len(server.asked()) == 2 * near.files + 1  # what it is, and its header; and that there is no sidecar


def test_small_tensors_come_many_in_one_request(tmp_path):
    write_file(tmp_path / "model.safetensors", **{f"t{number}": (4 * number, 5) for number in range(250)})
    with serving(tmp_path) as server:
        checkpoint = open_checkpoint(locate(server.url))
        server.requests.clear()
        with Reader(checkpoint) as reader:
            read = {key: reader.read(info).tobytes() for key, info in checkpoint.tensors.items()}
        assert read == {key: data for key, (_, _, data) in folders.stored(tmp_path).items()}
        blocks = -(-(tmp_path / "model.safetensors").stat().st_size // remote.BLOCK_BYTES)
        assert 2 < blocks == len(server.asked()) - 1  # the last asks whether the file is still the same


def test_tensors_of_a_unit_come_in_one_request(tmp_path):
    shapes = {f"t{number}": (300_000 if number % 2 else 40, 3) for number in range(8)}
    write_file(tmp_path / "model.safetensors", **shapes, far=(10**6,), end=(0, 3), last=(5,))
    stored = {key: (shape, data) for key, (_, shape, data) in folders.stored(tmp_path).items()}
    with serving(tmp_path) as server:
        checkpoint = open_checkpoint(locate(server.url))
        infos = [info for key, info in checkpoint.tensors.items() if key != "far"]
        server.requests.clear()
        with Reader(checkpoint) as reader:
            found = reader.read_many(reversed(infos))
        assert {key: (list(part.shape), part.tobytes()) for key, part in found.items()} == {
            info.key: stored[info.key] for info in infos
        }
        assert all(part.flags.writeable and part.flags.aligned for part in found.values())
        assert len(server.asked()) == 3  # the first eight, the last, and whether the file is still the same


@pytest.mark.parametrize("run_bytes", [1, 10, 25, 30, 10**9])
@pytest.mark.parametrize("gap_bytes", [0, 10, 20])
def test_however_tensors_are_read_together_they_are_the_same(tmp_path, monkeypatch, run_bytes, gap_bytes):
    monkeypatch.setattr("minimax_jax.io.reader._RUN_BYTES", run_bytes)
    monkeypatch.setattr("minimax_jax.io.reader._GAP_BYTES", gap_bytes)
    for name in "xyz":
        shapes = {f"{name}{number}": (number % 4, 5) for number in range(9)}
        write_file(tmp_path / f"{name}.safetensors", **shapes)
    with serving(tmp_path) as server:
        index = {f"{name}{number}": f"{name}.safetensors" for name in "xyz" for number in range(9)}
        write_index(tmp_path, index)
        checkpoint, near = open_checkpoint(locate(server.url)), open_checkpoint(tmp_path)
        keys = list(index)[::2]
        with Reader(checkpoint) as reader, Reader(near) as other:
            found = reader.read_many(checkpoint.tensors[key] for key in keys)
            wanted = other.read_many(near.tensors[key] for key in keys)
        stored = folders.stored(tmp_path)
    for key in keys:
        assert found[key].tobytes() == wanted[key].tobytes() == stored[key][2]
        assert list(found[key].shape) == list(wanted[key].shape) == stored[key][1]


def test_threads_that_want_the_same_block_ask_for_it_once(tmp_path):
    write_file(tmp_path / "model.safetensors", **{f"t{number}": (number, 5) for number in range(200)})
    with serving(tmp_path) as server:
        checkpoint = open_checkpoint(locate(server.url))
        server.requests.clear()
        with Reader(checkpoint) as reader, ThreadPoolExecutor(8) as pool:
            keys = list(checkpoint.tensors) * 3
            found = list(pool.map(lambda key: reader.read(checkpoint.tensors[key]).tobytes(), keys))
        stored = folders.stored(tmp_path)
        assert found == [stored[key][2] for key in keys]
        assert len(server.asked()) == 2


def test_a_large_tensor_is_one_request(large):
    server, stored = large
    checkpoint = open_checkpoint(locate(server.url))
    server.requests.clear()
    with Reader(checkpoint) as reader:
        assert reader.read(checkpoint.tensors["big"]).tobytes() == stored["big"]
    assert len(server.asked()) == 2  # the second asks whether the file is still the same


def test_rows_are_those_of_the_whole_and_no_more_is_sent(large):
    server, stored = large
    checkpoint = open_checkpoint(locate(server.url))
    server.sent_bytes.clear()
    with Reader(checkpoint) as reader:
        whole = np.frombuffer(stored["big"], np.uint8)
        wanted = 2 * remote.BLOCK_BYTES
        assert reader.read(checkpoint.tensors["big"], 5, 5 + wanted).tobytes() == whole[5 : 5 + wanted].tobytes()
        assert reader.view(checkpoint.tensors["big"], slice(5, 9)).tobytes() == whole[5:9].tobytes()
    assert server.sent_bytes.total() <= wanted + remote.BLOCK_BYTES + 1


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


def test_a_conversion_over_a_connection_that_keeps_breaking(made, web, tmp_path):
    mj.convert(made / "hf", tmp_path / "near")
    web.faults = Faults(drop_after=9_999)
    mj.convert(f"{web.url}/hf", tmp_path / "far")
    assert folders.files(tmp_path / "far") == folders.files(tmp_path / "near")


@pytest.mark.parametrize("status", [400, 401, 403, 404, 410, 416])
def test_a_refusal_names_the_url_and_is_not_repeated(made, web, status):
    web.faults = Faults(status=lambda path: status if path.endswith(".safetensors") else None)
    with pytest.raises(FormatError) as caught:
        mj.inspect(f"{web.url}/hf")
    files = {problem.file for problem in caught.value.problems}
    assert f"{web.url}/hf/{folders.weight_files(made / 'hf')[0].name}" in files
    assert len(web.asked()) == len(set(web.asked())) == len(files)
    assert status in (404, 410) or all(problem.remedy for problem in caught.value.problems)


def test_a_config_that_is_not_there(made, web, tmp_path):
    shutil.copytree(made / "hf", tmp_path / "hf")
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


# --- places -----------------------------------------------------------------------------------------------------------


def test_side_files_of_the_usual_names_are_found(made, web):
    found = {file.name for file in side_files(locate(f"{web.url}/hf"))}
    assert found == {file.name for file in side_files(made / "hf")} != set()
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
