"""Orbax checkpoints: what `write` streams and `save` saves, against `from_hf`, the safetensors library and Orbax."""

import subprocess
import sys

import folders
import jax
import numpy as np
import pytest
from helpers import FP8, bits, differences, native_of, quantize
from orbax.checkpoint import v1 as ocp
from orbax_cases import BIAS, assert_same, expected, stored

import minimax_jax as mj
from minimax_jax.dtypes import DTYPES
from minimax_jax.io import orbax_rows
from minimax_jax.jobs import orbax_plan
from minimax_jax.jobs.orbax import read, write
from minimax_jax.jobs.source import open_source

# ---- streamed


@pytest.mark.parametrize("dtype", ["BF16", "F32", "F8_E4M3"])
def test_what_is_written_is_what_from_hf_makes(orbax_source, orbax_written, dtype):
    got = read(orbax_written / dtype)
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(got))
    assert_same(got, expected(orbax_source, dtype))


@pytest.mark.parametrize("dtype", ["BF16", "F32"])
def test_what_is_written_is_what_plain_numpy_makes(orbax_source, orbax_written, dtype):
    config = mj.MiniMaxConfig.from_pretrained(orbax_source)
    assert (
        differences(read(orbax_written / dtype), native_of(folders.arrays(orbax_source), config, DTYPES[dtype])) == []
    )


@pytest.mark.parametrize("dtype", ["BF16", "F8_E4M3"])
def test_orbax_alone_loads_it_and_says_what_is_in_it(orbax_source, orbax_written, dtype):
    want = stored(expected(orbax_source, dtype))
    got = ocp.load(orbax_written / dtype)
    assert differences(got, want) == []
    told = ocp.metadata(orbax_written / dtype).metadata
    assert {key: (leaf.shape, leaf.dtype) for key, leaf in told.items()} == {
        key: (array.shape, array.dtype) for key, array in want.items()
    }
    assert not np.asarray(got[BIAS]).any()  # zeros are there, not left out


def test_side_files_and_config_lie_beside(orbax_source, orbax_written):
    for dtype, block in [("BF16", None), ("F8_E4M3", (128, 128))]:
        assert (orbax_written / dtype / "tokenizer.json").read_bytes() == (orbax_source / "tokenizer.json").read_bytes()
        assert mj.MiniMaxConfig.from_pretrained(orbax_written / dtype).weight_block_size == block


def test_the_report_and_the_progress_add_up(orbax_source, tmp_path):
    moments = []
    report = write(open_source(orbax_source), tmp_path / "out", dtype="F8_E4M3", workers=1, progress=moments.append)
    tensors = folders.arrays(orbax_source)
    nbytes = sum(array.nbytes for array in tensors.values())
    assert (report.read_bytes, report.written_bytes) == (nbytes, nbytes)
    assert moments[-1].done_bytes == moments[-1].total_bytes == nbytes
    assert report.tensors == len(ocp.load(tmp_path / "out"))
    assert (report.kept_scales, report.fresh_scales) == (0, ())


def test_a_native_source_comes_out_the_same(orbax_source, orbax_written, tmp_path):
    mj.convert(orbax_source, tmp_path / "native", dtype="fp8")
    write(open_source(tmp_path / "native"), tmp_path / "out", dtype="BF16")
    assert_same(read(tmp_path / "out"), read(orbax_written / "BF16"))


def test_float_weights_get_back_their_source_scales(orbax_source, orbax_written, tmp_path):
    mj.convert(orbax_source, tmp_path / "native", dtype="bf16")
    report = write(open_source(tmp_path / "native"), tmp_path / "out", dtype="F8_E4M3")
    assert report.kept_scales == len(folders.scaled_weights(orbax_source))
    assert_same(read(tmp_path / "out"), read(orbax_written / "F8_E4M3"))


def test_float_weights_without_source_scales_get_fresh_ones(orbax_source, tmp_path):
    mj.convert(orbax_source, tmp_path / "hf", to="hf")
    report = write(open_source(tmp_path / "hf"), tmp_path / "out", dtype="F8_E4M3")
    assert set(report.fresh_scales) == folders.scaled_weights(orbax_source)
    weights, got = folders.arrays(tmp_path / "hf"), read(tmp_path / "out")
    for expert in (0, 7):
        codes, scales = quantize(weights[f"model.layers.0.block_sparse_moe.experts.{expert}.w2.weight"])
        down = got["model.layers.0.mlp.experts.down_projs"]
        assert np.array_equal(bits(down.values[expert]), bits(codes.T))
        assert np.array_equal(bits(down.scale_inv[expert]), bits(scales.T))


@pytest.mark.parametrize("dtype", ["BF16", "F8_E4M3"])
def test_many_small_chunks_and_units_at_a_time_give_the_same(orbax_source, orbax_written, tmp_path, monkeypatch, dtype):
    monkeypatch.setattr(orbax_rows, "CHUNK_BYTES", 40_000)  # several chunks in most arrays, the last one not full
    monkeypatch.setattr(orbax_plan, "_UNIT_BYTES", 1)  # an expert in each unit: several write to one chunk of scales
    write(open_source(orbax_source), tmp_path / "out", dtype=dtype, workers=4)
    assert len(list((tmp_path / "out" / "state" / "model.embed_tokens.weight").iterdir())) == 5  # 4 x 78 rows of 264
    assert_same(read(tmp_path / "out"), read(orbax_written / dtype))


@pytest.mark.parametrize(
    ("shape", "itemsize", "rows"),
    [
        ((256, 3072, 3072), 2, 1),  # gate and up, bfloat16: a file for each expert
        ((256, 3072, 3072), 4, 1),  # more than a chunk in one row
        ((256, 24, 24), 4, 256),  # their scales
        ((200064, 3072), 2, 5461),  # the embedding
        ((3072,), 2, 3072),
        ((1, 1), 1, 1),
    ],
)
def test_chunks_of_the_published_shapes(shape, itemsize, rows):
    assert orbax_rows.chunk_rows(shape, itemsize) == rows


# ---- cross-checks


def test_orbax_reads_what_we_write_in_safetensors(orbax_source, tmp_path):
    mj.convert(orbax_source, tmp_path / "native", dtype="fp8")
    mj.convert(tmp_path / "native", tmp_path / "back", to="hf-fp8", shard_bytes=300_000)
    context = ocp.Context()
    context.checkpoint_layout = ocp.options.CheckpointLayout.SAFETENSORS
    with context:
        got = ocp.load(tmp_path / "back")
    assert any(array.dtype == FP8 for array in got.values())
    assert differences(got, folders.arrays(orbax_source)) == []


def test_orbax_is_not_imported_before_it_is_used():
    statement = "import sys, minimax_jax, minimax_jax.jobs.orbax, minimax_jax.jobs.orbax_source; "
    command = [sys.executable, "-c", statement + "print(*sys.modules)"]
    modules = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    assert "minimax_jax.io.orbax" in modules
    assert not {"orbax", "orbax.checkpoint", "tensorstore"} & set(modules)
