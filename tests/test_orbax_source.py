"""Orbax checkpoints as sources like any other: verified, converted, inspected and planned."""

import shutil

import folders
import pytest
from orbax_cases import GATE_UP, SUFFIX, assert_same, expected

import minimax_jax as mj
from minimax_jax import synthetic
from minimax_jax.errors import JobError, LayoutError
from minimax_jax.io import points

# ---- comparison with safetensors


@pytest.mark.parametrize(("dtype", "relations"), [("F8_E4M3", {"identical"}), ("BF16", {"identical", "equal"})])
def test_it_compares_with_the_source(orbax_source, orbax_written, dtype, relations):
    moments = []
    found = mj.verify(orbax_written / dtype, orbax_source, progress=moments.append).comparisons
    assert {comparison.key for comparison in found} == {
        key for key in folders.arrays(orbax_source) if not key.endswith(SUFFIX)
    }
    assert {comparison.relation for comparison in found} == relations
    assert moments[-1].done_bytes == moments[-1].total_bytes


def test_one_flipped_bit_is_found(orbax_source, orbax_written, tmp_path):
    folder = shutil.copytree(orbax_written / "BF16", tmp_path / "out")
    file = folder / "state" / GATE_UP / "0.0.0"
    data = bytearray(file.read_bytes())
    data[1] ^= 1  # expert 0, row 0, column 0: of gate
    file.write_bytes(data)
    found = mj.verify(folder, orbax_source).comparisons
    (changed,) = (comparison for comparison in found if comparison.relation == "different")
    assert (changed.key, changed.differing) == ("model.layers.0.block_sparse_moe.experts.0.w1.weight", 1)


def test_another_model_is_not_compared(orbax_written, tmp_path):
    synthetic.synthesize(tmp_path / "other", synthetic.config(layers=2, experts=8))
    with pytest.raises(LayoutError, match="num_hidden_layers"):
        mj.verify(orbax_written / "BF16", tmp_path / "other")


# ---- as a source like any other


@pytest.mark.parametrize(
    ("stored", "to", "dtype"), [("F8_E4M3", "hf-fp8", "fp8"), ("BF16", "hf", "bf16"), ("F8_E4M3", "native", "bf16")]
)
def test_it_converts_to_what_the_native_folder_converts_to(orbax_source, orbax_written, tmp_path, stored, to, dtype):
    mj.convert(orbax_source, tmp_path / "native", dtype={"F8_E4M3": "fp8", "BF16": "bf16"}[stored])
    for name, start in (("ours", orbax_written / stored), ("theirs", tmp_path / "native")):
        mj.convert(start, tmp_path / name, to=to, dtype=dtype)
    ours, theirs = folders.files(tmp_path / "ours"), folders.files(tmp_path / "theirs")
    assert ours == theirs


def test_work_of_a_source_that_was_changed_is_refused(orbax_written, tmp_path, monkeypatch):
    folder = shutil.copytree(orbax_written / "BF16", tmp_path / "in")
    seen = []

    def stop(name):
        seen.append(name)
        if len(seen) == 20:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(points, "on_reach", stop)
        mj.convert(folder, tmp_path / "out", to="hf")
    file = folder / "state" / GATE_UP / "0.0.0"
    file.write_bytes(file.read_bytes()[::-1])
    with pytest.raises(JobError, match=r"source file .* differs"):
        mj.convert(folder, tmp_path / "out", to="hf")


def test_it_is_inspected_planned_and_read_as_views(orbax_source, orbax_written):
    seen = mj.inspect(orbax_written / "F8_E4M3")
    assert seen.layout == "native" and mj.plan(orbax_written / "F8_E4M3", to="hf-fp8").write_bytes
    assert_same(mj.read_tree(orbax_written / "F8_E4M3"), expected(orbax_source, "F8_E4M3"))
