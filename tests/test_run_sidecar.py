"""Source scales beside native weights: what they keep, and what is quantised anew."""

import shutil

import folders
import numpy as np
import pytest
from folders import SIDECAR, SUFFIX
from run_cases import RAGGED, hf_names, make

import minimax_jax as mj
from minimax_jax import synthetic


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return make(tmp_path_factory.mktemp("made"))


GROUPED = "model.layers.1.mlp.experts.gate_and_up_projs"
EXPERT = "model.layers.1.block_sparse_moe.experts.2."


def change_up_projection(weight):
    """One number in the half of expert 2 that becomes `w3`."""
    weight[2, 5, RAGGED.intermediate_size + 3] = 0.0123
    return weight


def test_the_sidecar_holds_the_source_scales_grouped(made):
    source = folders.arrays(made / "hf")
    config = RAGGED.replace(weight_block_size=(128, 128))
    expected = folders.described(mj.source_scales(source, config))
    sidecar = folders.library_reads((made / "native" / SIDECAR).read_bytes())
    assert sidecar == expected


@pytest.mark.parametrize("dtype", ["bf16", "f32"])
@pytest.mark.parametrize("to", ["hf-fp8", "native"])
def test_only_the_weight_that_changed_is_quantised_anew(made, tmp_path, to, dtype):
    mj.convert(made / "hf", tmp_path / "edited", dtype=dtype)
    folders.edit(tmp_path / "edited", GROUPED, change_up_projection)
    report = mj.convert(tmp_path / "edited", tmp_path / "out", to=to, dtype="fp8")
    if to == "native":
        mj.convert(tmp_path / "out", tmp_path / "hf", to="hf-fp8")
    got, was = folders.stored(tmp_path / ("out" if to == "hf-fp8" else "hf")), folders.stored(made / "hf")
    changed = {key for key in was if got[key] != was[key]}
    weight = EXPERT + "w3.weight"
    assert weight in changed and changed <= {weight, weight + SUFFIX}
    assert report.fresh_scales == (weight,)
    assert report.kept_scales == sum(key.endswith(SUFFIX) for key in was) - 1
    native = folders.arrays(tmp_path / "edited")[GROUPED][2, :, RAGGED.intermediate_size :].T
    values, scales = mj.quantize(np.ascontiguousarray(native), block=(128, 128))
    assert got[weight][2] == np.asarray(values).tobytes() and got[weight + SUFFIX][2] == np.asarray(scales).tobytes()


def largest_everywhere(codes):
    """448 in the first row of every block: the largest code."""
    floats = codes.float()
    floats[::128] = 448.0
    return floats.to(codes.dtype)


def test_a_change_that_leaves_the_largest_value_alone_is_named(tmp_path):
    # The amax / 448 of every block is the source scale exactly: the new scales equal the old ones.
    synthetic.synthesize(tmp_path / "hf", RAGGED)
    key = "model.layers.0.block_sparse_moe.experts.0.w2.weight"
    folders.edit(tmp_path / "hf", key + SUFFIX, lambda scales: scales * 0 + 2.0**-12)
    folders.edit(tmp_path / "hf", key, largest_everywhere)
    mj.convert(tmp_path / "hf", tmp_path / "native", dtype="f32")

    def change(weight):
        weight[0, 1, 1] = 0.7 * 2.0**-12
        return weight

    folders.edit(tmp_path / "native", "model.layers.0.mlp.experts.down_projs", change)
    report = mj.convert(tmp_path / "native", tmp_path / "out", to="hf-fp8")
    assert folders.stored(tmp_path / "out")[key + SUFFIX] == folders.stored(tmp_path / "hf")[key + SUFFIX]
    assert report.fresh_scales == (key,)


def test_native_to_native_keeps_the_sidecar(made, tmp_path):
    mj.convert(made / "native", tmp_path / "f32", dtype="f32")
    mj.convert(tmp_path / "f32", tmp_path / "bf16", dtype="bf16", shard_bytes=100_000)
    assert (tmp_path / "f32" / SIDECAR).read_bytes() == (made / "native" / SIDECAR).read_bytes()
    assert folders.converted(tmp_path / "bf16") == folders.converted(made / "native")


def test_native_fp8_to_native_bf16_makes_the_same_sidecar(made, tmp_path):
    mj.convert(made / "hf", tmp_path / "fp8", dtype="fp8")
    assert not (tmp_path / "fp8" / SIDECAR).exists()
    mj.convert(tmp_path / "fp8", tmp_path / "bf16", shard_bytes=100_000)
    assert folders.converted(tmp_path / "bf16") == folders.converted(made / "native")


def test_without_a_sidecar_all_weights_get_fresh_scales(made, tmp_path):
    shutil.copytree(made / "native", tmp_path / "native")
    (tmp_path / "native" / SIDECAR).unlink()
    report = mj.convert(tmp_path / "native", tmp_path / "out", to="hf-fp8")
    native = mj.from_hf(folders.arrays(made / "hf"), RAGGED)
    assert folders.stored(tmp_path / "out") == folders.described(mj.to_hf(native, RAGGED, quantization=True))
    scaled = sorted(key for key in hf_names(RAGGED, "bf16") if key + SUFFIX in hf_names(RAGGED, "fp8"))
    assert report.fresh_scales == tuple(scaled) and report.kept_scales == 0
