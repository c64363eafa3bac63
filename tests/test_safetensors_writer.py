"""Files are written whole, each byte once, or refused."""

import errno
import json
import os
import random
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from raw_safetensors import library_reads

from minimax_jax.errors import FormatError, JobError
from minimax_jax.io.checkpoint import open_checkpoint
from minimax_jax.io.reader import Reader
from minimax_jax.io.shards import TensorOut, lay_out
from minimax_jax.io.writer import Writer


def out(key: str, *shape: int, dtype: str = "U8") -> TensorOut:
    return TensorOut(key=key, dtype=dtype, shape=shape)


def contents(file: Path) -> dict[str, bytes]:
    return {key: data for key, (_, _, data) in library_reads(file.read_bytes()).items()}


def test_no_tensors_make_one_empty_file(tmp_path: Path) -> None:
    with Writer(tmp_path, lay_out([])) as writer:
        writer.finish()
    assert contents(tmp_path / "model.safetensors") == {}


def test_eight_threads_in_any_order_write_what_one_would(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    arrays = {f"t{i}": generator.integers(0, 256, (int(generator.integers(1, 60)), 37), np.uint8) for i in range(40)}
    shards = lay_out([out(key, *array.shape) for key, array in arrays.items()], shard_bytes=9_000)
    pieces = [(key, row) for key, array in arrays.items() for row in range(len(array))]
    random.Random(0).shuffle(pieces)
    with Writer(tmp_path, shards) as writer, ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda piece: writer.write(piece[0], arrays[piece[0]][piece[1]], piece[1] * 37), pieces))
        writer.finish()
    found = {key: data for shard in shards for key, data in contents(tmp_path / shard.file_name).items()}
    assert found == {key: array.tobytes() for key, array in arrays.items()}


def test_the_index_names_every_tensor_and_the_true_size(tmp_path: Path) -> None:
    with Writer(tmp_path, lay_out([out("a", 3), out("b", 5), out("c", 0)], shard_bytes=4)) as writer:
        writer.write("b", bytes(5))
        writer.write("a", bytes(3))
        assert not (tmp_path / "model.safetensors.index.json").exists()
        writer.finish()
    index = json.loads((tmp_path / "model.safetensors.index.json").read_bytes())
    first, second = (f"model-0000{i}-of-00002.safetensors" for i in (1, 2))
    assert index == {"metadata": {"total_size": 8}, "weight_map": {"a": first, "b": second, "c": second}}
    assert open_checkpoint(tmp_path).nbytes == 8
    assert sorted(file.name for file in tmp_path.iterdir()) == [first, second, "model.safetensors.index.json"]


def test_arrays_of_any_dtype_and_plain_buffers_are_written(tmp_path: Path) -> None:
    fp8 = np.arange(4, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).reshape(2, 2)
    with Writer(tmp_path, lay_out([out("a", 2, 2, dtype="F8_E4M3"), out("b", dtype="F32"), out("c", 6)])) as writer:
        writer.write("a", fp8)
        writer.write("b", np.array(1.5, np.float32))
        writer.write("c", bytearray(b"xy"), 2)
        writer.write("c", np.array([[7], [8]], np.uint8).data)
        writer.write("c", np.zeros((0, 3)), 6)
        writer.write("c", np.zeros((0, 3)).data, 6)
        writer.write("c", b"z!", 4)
        writer.finish()
    found = contents(tmp_path / "model.safetensors")
    assert found == {"a": bytes(range(4)), "b": np.float32(1.5).tobytes(), "c": b"\x07\x08xyz!"}


@pytest.mark.parametrize(
    ("key", "data", "offset_bytes", "words"),
    [
        ("gone", b"x", 0, "no such tensor"),
        ("a", bytes(17), 0, "outside"),
        ("a", bytes(2), 15, "outside"),
        ("a", b"x", -1, "outside"),
        ("a", b"", 17, "outside"),
        ("a", np.zeros((4, 4), np.uint8).T[:2], 0, "not contiguous"),
        ("a", np.zeros((4, 4), np.uint8)[:, 0], 0, "not contiguous"),
        ("a", np.zeros((2, 2), ml_dtypes.bfloat16).T, 0, "not contiguous"),
        ("a", memoryview(bytes(8))[::2], 0, "not contiguous"),
        ("b", bytes(5), 0, "twice"),
        ("b", bytes(4), 3, "twice"),
        ("b", bytes(2), 5, "twice"),
        ("b", bytes(16), 0, "twice"),
        ("b", bytes(5), 7, "twice"),
    ],
)
def test_writes_that_make_no_sense_are_refused_and_change_nothing(
    tmp_path: Path, key: str, data: Any, offset_bytes: int, words: str
) -> None:
    with Writer(tmp_path, lay_out([out("a", 16), out("b", 16)])) as writer:
        writer.write("b", b"1234", 4)
        writer.write("b", b"123456", 10)
        with pytest.raises(JobError, match=words):
            writer.write(key, data, offset_bytes)
        writer.write("b", b"....", 0)
        writer.write("b", b"::", 8)
        writer.write("a", bytes(range(16)))
        writer.finish()
    assert contents(tmp_path / "model.safetensors") == {"a": bytes(range(16)), "b": b"....1234::123456"}


RANGES = st.lists(st.tuples(st.integers(0, 12), st.integers(0, 5)), max_size=12)


@settings(max_examples=200, deadline=None)
@given(ranges=RANGES)
def test_each_byte_is_taken_exactly_once(
    tmp_path_factory: pytest.TempPathFactory, ranges: list[tuple[int, int]]
) -> None:
    folder = tmp_path_factory.mktemp("once")
    free = set(range(12))
    with Writer(folder, lay_out([out("a", 12)])) as writer:
        for start, length in ranges:
            wanted = set(range(start, start + length))
            if start + length <= 12 and wanted <= free:
                writer.write("a", bytes([start]) * length, start)
                free -= wanted
            else:
                with pytest.raises(JobError, match=r"outside|twice"):
                    writer.write("a", bytes(length), start)
        if free:
            with pytest.raises(JobError, match=f"nothing at bytes {min(free)} to"):
                writer.finish()
        else:
            writer.finish()
    shutil.rmtree(folder)


def test_what_was_not_written_is_told_for_all_tensors(tmp_path: Path) -> None:
    with Writer(tmp_path, lay_out([out("a", 8), out("b", 8), out("c", 8), out("empty", 0)], shard_bytes=16)) as writer:
        writer.write("a", bytes(8))
        writer.write("b", bytes(3), 5)
        with pytest.raises(JobError) as caught:
            writer.finish()
        assert [(p.key, p.expected, p.got) for p in caught.value.problems] == [
            ("b", "8 bytes", "3 bytes, nothing at bytes 0 to 5"),
            ("c", "8 bytes", "0 bytes, nothing at bytes 0 to 8"),
        ]
        writer.write("b", bytes(5))
        writer.write("c", bytes(8))
        writer.finish()
    assert open_checkpoint(tmp_path).nbytes == 24


def test_a_writer_that_did_not_finish_leaves_nothing_that_can_be_read(tmp_path: Path) -> None:
    with Writer(tmp_path, lay_out([out("a", 8)])) as writer:
        writer.write("a", bytes(8))
    with pytest.raises(FormatError, match="never finished"):
        open_checkpoint(tmp_path)
    with pytest.raises(JobError, match="closed"):
        writer.finish()


def test_a_finished_writer_takes_no_more(tmp_path: Path) -> None:
    with Writer(tmp_path, lay_out([out("a", 1)])) as writer:
        writer.write("a", b"x")
        writer.finish()
        with pytest.raises(JobError, match="closed"):
            writer.write("a", b"", 0)
        with pytest.raises(JobError, match="closed"):
            writer.finish()


def test_a_failed_write_is_not_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object) -> int:
        raise OSError(errno.EIO, "Input/output error")

    with Writer(tmp_path, lay_out([out("a", 8)])) as writer:
        with monkeypatch.context() as patched:
            patched.setattr(os, "pwrite", fail)
            with pytest.raises(JobError, match="Input/output error"):
                writer.write("a", bytes(8))
        with pytest.raises(JobError, match="write is unfinished"):
            writer.finish()


def test_short_writes_and_short_reads_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pwrite, preadv = os.pwrite, os.preadv
    monkeypatch.setattr(os, "pwrite", lambda fd, data, place: pwrite(fd, data[:3], place))
    monkeypatch.setattr(os, "preadv", lambda fd, buffers, place: preadv(fd, [buffers[0][:3]], place))
    with Writer(tmp_path, lay_out([out("a", 16)])) as writer:
        writer.write("a", bytes(range(16)))
        writer.finish()
    checkpoint = open_checkpoint(tmp_path)
    with Reader(checkpoint) as reader:
        assert reader.read(checkpoint.tensors["a"]).tolist() == list(range(16))


def test_closing_waits_for_writes_under_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pwrite, started, go_on = os.pwrite, threading.Event(), threading.Event()

    def slow(fd: int, data: memoryview, place: int) -> int:
        started.set()
        assert go_on.wait(10)
        return pwrite(fd, data, place)

    writer = Writer(tmp_path, lay_out([out("a", 4)]))
    monkeypatch.setattr(os, "pwrite", slow)
    with ThreadPoolExecutor(2) as pool:
        write = pool.submit(writer.write, "a", b"abcd")
        assert started.wait(10)
        close = pool.submit(writer.close)
        with pytest.raises(TimeoutError):
            close.result(0.1)
        go_on.set()
        write.result(10)
        close.result(10)
    assert (tmp_path / "model.safetensors").read_bytes().endswith(b"abcd")
