"""Samples of checkpoints, and numbers that a sound one does not hold."""

import math

import folders
import ml_dtypes
import numpy as np
import pytest
import torch
from certified_cases import CONFIG, EMBED, Q_PROJ, mismatches
from command_line import run
from folders import SUFFIX

import minimax_jax as mj
from minimax_jax.dtypes import DTYPES
from minimax_jax.errors import JobError
from minimax_jax.jobs.numbers import unusual

# --- samples ---------------------------------------------------------------------------------------------------------


def test_a_sample_is_always_the_same_part_in_any_layout(certified):
    keys = {}
    for asked in ("1", "10%", 6, "100%"):
        parts = [mj.verify(certified / name, sample=asked) for name in ("hf", "fp8", "hf")]
        assert len({tuple(part.checkpoints[0].digests) for part in parts}) == 1
        keys[asked] = {digest.key for digest in parts[0].checkpoints[0].digests}
        assert parts[0].sample.entries == {"1": 1, "10%": 3, 6: 6, "100%": 27}[asked] and parts[0].sample.of == 27
    assert keys["1"] < keys["10%"] < keys[6] < keys["100%"] == set(folders.stored(certified / "hf"))


def test_a_sample_compares_and_counts_its_part_alone(certified):
    moments = []
    seen = mj.verify(certified / "hf", certified / "bf16", sample="20%", progress=moments.append)
    weights = {comparison.key for comparison in seen.comparisons}
    assert seen.good and weights == {d.key for d in seen.checkpoints[0].digests if not d.key.endswith(SUFFIX)}
    assert len(weights) < len(folders.stored(certified / "bf16")) and moments[-1].done_bytes == moments[0].total_bytes


def test_a_sample_and_a_certificate_meet_in_what_both_know(certified, certified_copy, tmp_path):
    mj.verify(certified / "hf", sample=9, output=tmp_path / "nine.json")
    nine = mj.verify(certified / "hf", certificate=tmp_path / "nine.json")
    four = mj.verify(certified / "hf", certificate=tmp_path / "nine.json", sample=4)
    whole = mj.verify(certified / "hf", certificate=certified / "hf.json", sample=4)
    assert nine.good and four.good and whole.good
    assert (nine.sample.entries, four.sample.entries, whole.sample.entries) == (9, 4, 4)
    sampled = {digest.key for digest in nine.checkpoints[0].digests}
    folder = certified_copy("hf")
    inside = next(key for key in folders.stored(certified / "hf") if key in sampled)
    outside = next(key for key in folders.stored(certified / "hf") if key not in sampled)
    folders.flip_bit(folder, outside, 5)
    assert not mismatches(mj.verify(folder, certificate=tmp_path / "nine.json")) & {(outside, "sha256")}
    folders.flip_bit(folder, inside, 5)
    assert (inside, "sha256") in mismatches(mj.verify(folder, certificate=tmp_path / "nine.json"))


@pytest.mark.parametrize("asked", ["0", "0%", "-1", "101%", "1.5", "x", "%", "", "nan%", "inf", "1e3", "٣"])
def test_samples_that_make_no_sense_are_refused(certified, asked):
    with pytest.raises(JobError, match="no such sample"):
        mj.verify(certified / "hf", sample=asked)
    run("verify", certified / "hf", "--sample", asked, code=2)


# --- numbers that a sound checkpoint does not hold -------------------------------------------------------------------


def test_unusual_codes_scales_and_floats_are_counted_and_change_nothing(certified, certified_copy):
    folder = certified_copy("hf")

    def codes(weight):
        weight.view(torch.uint8)[0, :3] = torch.tensor([0x7F, 0xFF, 0x7E], dtype=torch.uint8)
        return weight

    def scales(values):
        def change(scale):
            scale[0, : len(values)] = torch.tensor(values)
            return scale

        return change

    down = "model.layers.0.block_sparse_moe.experts.0.w2.weight"
    folders.edit(folder, Q_PROJ, codes)
    folders.edit(folder, Q_PROJ + SUFFIX, scales([math.inf, math.nan]))
    folders.edit(folder, down + SUFFIX, lambda scale: torch.tensor([-1e-40, -0.0]).reshape(scale.shape))
    folders.edit(folder, EMBED, lambda weight: weight.index_fill_(0, torch.tensor([1]), -math.inf))
    (seen,) = mj.verify(folder).checkpoints
    assert {(each.key, each.what): each.count for each in seen.unusual} == {
        (Q_PROJ, "NaN"): 2,
        (Q_PROJ + SUFFIX, "NaN"): 1,
        (Q_PROJ + SUFFIX, "infinity"): 1,
        (down + SUFFIX, "zero scale"): 1,
        (down + SUFFIX, "subnormal scale"): 1,
        (down + SUFFIX, "negative scale"): 1,
        (EMBED, "infinity"): CONFIG.hidden_size,
    }
    assert mj.verify(folder, folder, by="bytes").good
    assert "unusual numbers" in run("verify", folder)[0] and mj.verify(certified / "hf").checkpoints[0].unusual == ()


# --- on the command line ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("at_once", [7, 2**17])
@pytest.mark.parametrize("name", ["F8_E4M3", "BF16", "F16", "F32"])
def test_unusual_numbers_are_those_that_numpy_counts(monkeypatch, name, at_once):
    monkeypatch.setattr("minimax_jax.jobs.numbers._AT_ONCE", at_once)
    dtype = DTYPES[name]
    bits = np.random.default_rng(0).integers(0, 256, 6000 * dtype.itemsize, dtype=np.uint8)
    special = np.array([0.0, -0.0, math.nan, -math.nan, math.inf, -math.inf, 1e-40, -1e-40], np.float32)
    tensor = np.concatenate([bits.view(dtype), special.astype(dtype)]).reshape(4, -1)
    with np.errstate(invalid="ignore"):  # signalling NaN
        wide = tensor.astype(np.float64)
    tiny = ml_dtypes.finfo(dtype).smallest_normal
    expected = {
        "NaN": np.isnan(wide).sum(),
        "infinity": np.isinf(wide).sum(),
        "zero scale": (wide == 0).sum(),
        "subnormal scale": ((wide != 0) & (np.abs(wide) < float(tiny))).sum(),
        "negative scale": (wide < 0).sum(),
    }
    kinds = ["NaN", "infinity", *(["zero scale", "subnormal scale", "negative scale"] if name != "F8_E4M3" else [])]
    found = {each.what: each.count for each in unusual("x", tensor, is_scale=True)}
    assert found == {kind: expected[kind] for kind in kinds if expected[kind]} and found["NaN"] > 1
    assert {each.what for each in unusual("x", tensor, is_scale=False)} <= {"NaN", "infinity"}
