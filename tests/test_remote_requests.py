"""A checkpoint on a web server is read in few requests, each of no more than is needed."""

from concurrent.futures import ThreadPoolExecutor

import folders
import numpy as np
import pytest
from raw_safetensors import write_file, write_index
from remote_cases import serving_large
from servers import serving

import minimax_jax as mj
from minimax_jax import synthetic
from minimax_jax.io import remote
from minimax_jax.io.checkpoint import open_checkpoint
from minimax_jax.io.location import locate
from minimax_jax.io.reader import Reader


@pytest.fixture
def large(tmp_path):
    with serving_large(tmp_path) as served:
        yield served


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
