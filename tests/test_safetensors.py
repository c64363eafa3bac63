"""Files that the safetensors library writes are read here to the bit, and the other way round."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest
import safetensors
import safetensors.numpy
import safetensors.torch
import torch
from raw_safetensors import bits, random_bits

from minimax_jax.dtypes import DTYPES, dtype_of, name_of
from minimax_jax.errors import FormatError
from minimax_jax.io.checkpoint import open_checkpoint
from minimax_jax.io.reader import Reader
from minimax_jax.io.shards import TensorOut, lay_out
from minimax_jax.io.writer import Writer

TORCH_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "U16": torch.uint16,
    "I16": torch.int16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "F32": torch.float32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F64": torch.float64,
    "C64": torch.complex64,
}


def save(folder: Path, tensors: dict[str, torch.Tensor], shard_bytes: int = 10**9) -> None:
    names = {dtype: name for name, dtype in TORCH_DTYPES.items()}
    outs = [TensorOut(key=key, dtype=names[value.dtype], shape=tuple(value.shape)) for key, value in tensors.items()]
    with Writer(folder, lay_out(outs, shard_bytes=shard_bytes)) as writer:
        for key, value in tensors.items():
            writer.write(key, bits(value))
        writer.finish()


def test_the_torch_table_covers_every_dtype() -> None:
    assert TORCH_DTYPES.keys() == DTYPES.keys()


@pytest.mark.parametrize("name", DTYPES)
def test_names_and_dtypes_are_inverse(name: str) -> None:
    assert name_of(dtype_of(name)) == name


def test_dtypes_that_the_format_does_not_have_are_refused() -> None:
    with pytest.raises(FormatError, match="F4"):
        dtype_of("F4")
    with pytest.raises(FormatError, match="complex128"):
        name_of(np.complex128)
    with pytest.raises(FormatError, match=">f4"):
        name_of(">f4")


@pytest.mark.parametrize("name", DTYPES)
def test_torch_files_are_read_to_the_bit_and_to_the_value(tmp_path: Path, name: str) -> None:
    saved = random_bits(TORCH_DTYPES[name], (64, 16))
    safetensors.torch.save_file({"x": saved}, tmp_path / "model.safetensors")
    checkpoint = open_checkpoint(tmp_path)
    with Reader(checkpoint) as reader:
        found = reader.view(checkpoint.tensors["x"])
    assert (checkpoint.tensors["x"].dtype, found.shape) == (name, (64, 16))
    assert bits(found) == bits(saved)
    wide = torch.complex128 if saved.is_complex() else torch.float64 if saved.is_floating_point() else torch.int64
    expected = saved.to(wide).numpy()
    with np.errstate(invalid="ignore"):
        np.testing.assert_array_equal(found.astype(expected.dtype), expected)


@pytest.mark.parametrize("name", DTYPES)
def test_torch_reads_our_files_to_the_bit(tmp_path: Path, name: str) -> None:
    written = {"x": random_bits(TORCH_DTYPES[name], (64, 16)), "scalar": random_bits(TORCH_DTYPES[name], ())}
    save(tmp_path, written)
    found = safetensors.torch.load_file(tmp_path / "model.safetensors")
    assert {key: (v.dtype, v.shape, bits(v)) for key, v in found.items()} == {
        key: (v.dtype, v.shape, bits(v)) for key, v in written.items()
    }


def test_numpy_files_cross_both_ways(tmp_path: Path) -> None:
    grid, line = np.arange(12, dtype=np.float32).reshape(3, 4), np.arange(5, dtype=np.int64)
    arrays: dict[str, npt.NDArray[Any]] = {"b": grid, "a": line}
    safetensors.numpy.save_file(arrays, tmp_path / "theirs.safetensors", metadata={"made by": "numpy"})
    checkpoint = open_checkpoint(tmp_path / "theirs.safetensors")
    with Reader(checkpoint) as reader:
        for key, array in arrays.items():
            np.testing.assert_array_equal(reader.read(checkpoint.tensors[key]), array, strict=True)
    assert checkpoint.metadata == {"made by": "numpy"}

    shards = lay_out([TensorOut(key=key, dtype=name_of(a.dtype), shape=a.shape) for key, a in arrays.items()])
    with Writer(tmp_path, shards) as writer:
        for key, array in arrays.items():
            writer.write(key, array)
        writer.finish()
    found = safetensors.numpy.load_file(tmp_path / "model.safetensors")
    for key, array in arrays.items():
        np.testing.assert_array_equal(found[key], array, strict=True)


def test_views_of_our_files_are_aligned_to_64_bytes(tmp_path: Path) -> None:
    save(tmp_path, {f"t{i}": random_bits(torch.float8_e4m3fn, (i, 64)) for i in range(1, 6)}, shard_bytes=400)
    checkpoint = open_checkpoint(tmp_path)
    with Reader(checkpoint) as reader:
        assert all(reader.view(info).ctypes.data % 64 == 0 for info in checkpoint.tensors.values())


def test_our_sharded_files_load_as_their_library_splits_them(tmp_path: Path) -> None:
    tensors = {f"t{i}": random_bits(torch.bfloat16, (i + 1, 8), seed=i) for i in range(6)}
    save(tmp_path, tensors, shard_bytes=100)
    checkpoint = open_checkpoint(tmp_path)
    assert len(checkpoint.files) > 1 and checkpoint.index_file == tmp_path / "model.safetensors.index.json"
    assert list(checkpoint.tensors) == list(tensors)
    assert checkpoint.nbytes == sum(tensor.nbytes for tensor in tensors.values())
    for file in checkpoint.files:
        for key, found in safetensors.torch.load_file(file).items():
            assert bits(found) == bits(tensors[key]) and checkpoint.tensors[key].file == file


def test_a_weight_and_its_scale_may_lie_in_different_files(tmp_path: Path) -> None:
    tensors = {"w.weight": random_bits(torch.float8_e4m3fn, (4, 4)), "w.weight_scale_inv": torch.tensor([[0.5]])}
    save(tmp_path, tensors, shard_bytes=1)
    checkpoint = open_checkpoint(tmp_path)
    files = {checkpoint.tensors[key].file for key in tensors}
    assert len(files) == 2
    with Reader(checkpoint) as reader:
        assert all(bits(reader.view(checkpoint.tensors[key])) == bits(value) for key, value in tensors.items())


@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (1,)])
def test_scalars_and_empty_tensors_cross_both_ways(tmp_path: Path, shape: tuple[int, ...]) -> None:
    tensors = {"odd": random_bits(torch.bfloat16, shape), "after": torch.ones(3)}
    safetensors.torch.save_file(tensors, tmp_path / "theirs.safetensors")
    theirs = open_checkpoint(tmp_path / "theirs.safetensors")
    with Reader(theirs) as reader:
        for method in (reader.view, reader.read):
            found = method(theirs.tensors["odd"])
            assert (found.shape, found.dtype, bits(found)) == (shape, ml_dtypes.bfloat16, bits(tensors["odd"]))
    save(tmp_path, tensors)
    loaded = safetensors.torch.load_file(tmp_path / "model.safetensors")["odd"]
    assert (tuple(loaded.shape), bits(loaded)) == (shape, bits(tensors["odd"]))


@pytest.mark.parametrize("extra", [None, "jax", "torch", "safetensors"])
def test_importing_the_floor_imports_no_framework(extra: str | None) -> None:
    modules = ["checkpoint", "reader", "shards", "writer"]
    lines = [f"import minimax_jax.io.{module}" for module in modules] + ([f"import {extra}"] if extra else [])
    check = "import sys; print(sorted({'jax', 'torch', 'safetensors'} & sys.modules.keys()))"
    done = subprocess.run(
        [sys.executable, "-c", "\n".join([*lines, check])], capture_output=True, text=True, check=True
    )
    assert (done.stdout.strip() == "[]") == (extra is None), done.stdout
