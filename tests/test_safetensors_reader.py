"""Views, fresh arrays and positioned reads: the right bytes, or an error."""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest
import safetensors.torch
import torch
from raw_safetensors import bits, entry, random_bits, raw_bytes, write_file

from minimax_jax.errors import FormatError, JobError, LayoutError
from minimax_jax.io.checkpoint import open_checkpoint
from minimax_jax.io.reader import Reader


def test_views_copy_nothing_are_read_only_and_outlive_the_reader(tmp_path: Path) -> None:
    info = open_checkpoint(write_file(tmp_path / "m.safetensors", x=(4, 8))).tensors["x"]
    with Reader(open_checkpoint(tmp_path)) as reader:
        whole, part = reader.view(info), reader.view(info, slice(1, 3))
    assert np.shares_memory(whole[1:3], part) and not whole.flags.writeable and not part.flags.owndata
    with pytest.raises(ValueError, match="WRITEABLE"):
        whole.flags.writeable = True
    assert part.tolist() == [[0] * 8] * 2


@pytest.mark.parametrize("rows", [(0, 5), (2, 4), (3, None), (None, 1), (5, 5), (2, 2)])
def test_rows_are_those_of_the_whole(tmp_path: Path, rows: tuple[int | None, int | None]) -> None:
    whole = random_bits(torch.float8_e4m3fn, (5, 3, 2)).view(torch.uint8).numpy().view(ml_dtypes.float8_e4m3fn)
    safetensors.torch.save_file({"x": torch.from_numpy(whole.view(np.uint8))}, tmp_path / "m.safetensors")
    checkpoint = open_checkpoint(tmp_path)
    with Reader(checkpoint) as reader:
        for found in (
            reader.view(checkpoint.tensors["x"], slice(*rows)),
            reader.read(checkpoint.tensors["x"], *rows),
        ):
            np.testing.assert_array_equal(found, whole.view(np.uint8)[slice(*rows)], strict=True)


@pytest.mark.parametrize("rows", [slice(0, 6), slice(-1, 2), slice(3, 2), slice(0, 4, 2)])
def test_rows_outside_of_the_tensor_are_refused(tmp_path: Path, rows: slice) -> None:
    checkpoint = open_checkpoint(write_file(tmp_path / "m.safetensors", x=(5, 2)))
    with Reader(checkpoint) as reader, pytest.raises(LayoutError, match="x"):
        reader.view(checkpoint.tensors["x"], rows)


def test_a_scalar_has_no_rows(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write_file(tmp_path / "m.safetensors", x=()))
    with Reader(checkpoint) as reader, pytest.raises(LayoutError, match="no such rows"):
        reader.read(checkpoint.tensors["x"], 0, 1)


def test_data_that_is_not_aligned_is_read(tmp_path: Path) -> None:
    values = np.array([1.5, -2.25, np.pi], np.float32)
    header = {"a": entry("U8", [1], 0, 1), "b": entry("F32", [3], 1, 13)}
    (tmp_path / "m.safetensors").write_bytes(raw_bytes(header, b"\x07" + values.tobytes()))
    checkpoint = open_checkpoint(tmp_path)
    with Reader(checkpoint) as reader:
        assert reader.view(checkpoint.tensors["b"]).tolist() == reader.read(checkpoint.tensors["b"]).tolist()
        np.testing.assert_array_equal(reader.view(checkpoint.tensors["b"]), values, strict=True)


def test_read_into_fills_the_callers_memory(tmp_path: Path) -> None:
    file = write_file(tmp_path / "m.safetensors", x=(4,), y=(8,))
    checkpoint = open_checkpoint(file)
    fp8 = np.zeros((2, 4), ml_dtypes.float8_e4m3fn)
    flat = bytearray(6)
    with Reader(checkpoint) as reader:
        reader.read_into(file, checkpoint.tensors["y"].start, fp8)
        reader.read_into(file, checkpoint.tensors["x"].stop - 3, memoryview(flat))
        reader.read_into(file, checkpoint.tensors["x"].start, np.zeros((0, 3)))
    assert fp8.view(np.uint8).tolist() == [[1] * 4] * 2
    assert flat == b"\0\0\0\1\1\1"


def test_read_into_refuses_memory_it_cannot_fill(tmp_path: Path) -> None:
    file = write_file(tmp_path / "m.safetensors", x=(64,))
    grid = np.zeros((4, 4), np.uint8)
    fixed = np.zeros(4)
    fixed.flags.writeable = False
    with Reader(open_checkpoint(file)) as reader:
        refused: list[npt.NDArray[Any]] = [grid.T[:2], grid[:, :2], fixed]
        for buffer, what in zip(refused, ["contiguous", "contiguous", "read-only"], strict=True):
            with pytest.raises(JobError, match=what):
                reader.read_into(file, 0, buffer)
        with pytest.raises(JobError, match="not part"):
            reader.read_into(write_file(tmp_path / "other.safetensors", x=(1,)), 0, grid)
    with pytest.raises(JobError, match="closed"):
        reader.read_into(file, 0, grid)


@pytest.mark.parametrize("left_bytes", [0, 1, -1])
def test_a_file_that_shrank_is_an_error_and_never_data(tmp_path: Path, left_bytes: int) -> None:
    file = write_file(tmp_path / "m.safetensors", x=(64,))
    checkpoint = open_checkpoint(file)
    info = checkpoint.tensors["x"]
    file.write_bytes(file.read_bytes()[:left_bytes])
    buffer = bytearray(64)
    calls: list[Callable[[Reader], object]] = [
        lambda reader: reader.view(info),
        lambda reader: reader.read(info),
        lambda reader: reader.read_into(file, info.start, memoryview(buffer)),
    ]
    for call in calls:
        with Reader(checkpoint) as reader, pytest.raises(FormatError, match=r"truncated(.|\n)*m\.safetensors"):
            call(reader)


def overwrite(file: Path) -> None:
    with file.open("r+b") as stream:
        stream.seek(-1, os.SEEK_END)
        stream.write(b"\xff")


def replace(file: Path) -> None:
    status, other = file.stat(), file.with_name("other")
    other.write_bytes(file.read_bytes()[:-1] + b"\xff")
    os.utime(other, ns=(status.st_atime_ns, status.st_mtime_ns))
    other.replace(file)


@pytest.mark.parametrize("change", [overwrite, replace])
def test_a_file_of_the_same_size_put_there_after_opening_is_refused(
    tmp_path: Path, change: Callable[[Path], None]
) -> None:
    file = write_file(tmp_path / "m.safetensors", x=(64,))
    checkpoint = open_checkpoint(file)
    change(file)
    info, buffer = checkpoint.tensors["x"], bytearray(64)
    calls: list[Callable[[Reader], object]] = [
        lambda reader: reader.view(info),
        lambda reader: reader.read(info),
        lambda reader: reader.read_into(file, info.start, memoryview(buffer)),
    ]
    for call in calls:
        with (
            Reader(checkpoint) as reader,
            pytest.raises(FormatError, match=r"changed or replaced(.|\n)*m\.safetensors"),
        ):
            call(reader)
    assert buffer == bytes(64)


def test_a_file_written_to_while_it_is_read_is_found_when_the_context_ends(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write_file(tmp_path / "m.safetensors", x=(64,)))
    with pytest.raises(FormatError, match="changed or replaced"), Reader(checkpoint) as reader:
        reader.read(checkpoint.tensors["x"])
        overwrite(tmp_path / "m.safetensors")


def test_another_error_is_not_hidden_by_a_file_written_to(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write_file(tmp_path / "m.safetensors", x=(64,)))
    with pytest.raises(ZeroDivisionError), Reader(checkpoint) as reader:
        reader.read(checkpoint.tensors["x"])
        overwrite(tmp_path / "m.safetensors")
        raise ZeroDivisionError


def test_a_file_put_in_the_place_of_one_that_is_open_changes_nothing(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write_file(tmp_path / "m.safetensors", x=(64,)))
    with Reader(checkpoint) as reader:
        reader.read(checkpoint.tensors["x"], 0, 1)
        replace(tmp_path / "m.safetensors")
        assert bits(reader.read(checkpoint.tensors["x"])) == bytes(64)


def test_a_file_that_shrank_after_it_was_mapped_is_an_error_and_not_a_crash(tmp_path: Path) -> None:
    file = write_file(tmp_path / "m.safetensors", x=(4096,), y=(4096,))
    checkpoint = open_checkpoint(file)
    with pytest.raises(FormatError, match="truncated"), Reader(checkpoint) as reader:
        reader.view(checkpoint.tensors["x"])
        os.truncate(file, checkpoint.tensors["x"].stop)
        assert bits(reader.view(checkpoint.tensors["x"])) == bytes(4096)
        reader.view(checkpoint.tensors["y"])


def test_threads_read_without_disturbing_each_other(tmp_path: Path) -> None:
    tensors = {f"t{i}": random_bits(torch.uint8, (257, 31), seed=i) for i in range(24)}
    for key, value in tensors.items():
        safetensors.torch.save_file({key: value}, tmp_path / f"{key}.safetensors")
    checkpoint = open_checkpoint(tmp_path)
    with Reader(checkpoint) as reader, ThreadPoolExecutor(8) as pool:
        for method in (reader.view, reader.read):
            found = pool.map(lambda key, method=method: bits(method(checkpoint.tensors[key])), list(tensors) * 4)
            assert list(found) == [bits(value) for value in tensors.values()] * 4
