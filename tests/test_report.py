"""Reports: every figure against numpy in float64, in one pass and in flat memory."""

import tracemalloc

import folders
import numpy as np
import pytest
import torch
from folders import SUFFIX
from helpers import BF16, F32, dequantize, quantize, random_hf
from report_cases import (
    BIAS,
    BLOCK,
    CONFIG,
    NORM,
    W1,
    blocks_of,
    by_key,
    found,
    in_float64,
    make,
    overview,
    requantised,
)

import minimax_jax as mj
from minimax_jax import synthetic
from minimax_jax.jobs import look
from minimax_jax.jobs.figures import float_blocks, outliers
from minimax_jax.jobs.findings import expert_norms, robust_sigmas
from minimax_jax.jobs.measure import gather
from minimax_jax.jobs.source import open_source
from minimax_jax.page.render import render


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return make(tmp_path_factory.mktemp("made"))


@pytest.fixture
def other(made, tmp_path):
    return folders.write(tmp_path / "other", random_hf(CONFIG), CONFIG)


@pytest.fixture(scope="module")
def seen(made):
    return overview(made / "hf")


# --- the figures, against float64 ------------------------------------------------------------------------------------


def test_every_weight_has_its_norm_and_its_largest_magnitude(made, seen):
    arrays = folders.arrays(made / "hf")
    assert by_key(seen).keys() == {key for key in arrays if not key.endswith(SUFFIX)}
    for key, each in by_key(seen).items():
        weight = in_float64(arrays, key)
        assert each.squares == pytest.approx(np.square(weight).sum(), rel=1e-12)
        assert each.amax == pytest.approx(np.abs(weight).max(), rel=1e-12)
        assert (each.shape, each.elements) == (weight.shape, weight.size)


def test_every_fp8_weight_has_its_codes_and_the_spread_of_its_scales(made, seen):
    arrays = folders.arrays(made / "hf")
    total = np.zeros(256, int)
    for key in folders.scaled_weights(made / "hf"):
        codes, scales = arrays[key].view(np.uint8), arrays[key + SUFFIX].astype(np.float64)
        scaled = by_key(seen)[key].scaled
        assert scaled.spread == pytest.approx(np.log2(scales.max() / scales.min()), rel=1e-12)
        assert scaled.saturated == np.isin(codes, [0x7E, 0xFE]).sum() and scaled.zeros == np.isin(codes, [0, 128]).sum()
        assert scaled.blocks == scales.size
        total += np.bincount(codes.ravel(), minlength=256)
    assert np.array_equal(seen.codes, total)


def test_what_new_scales_would_change(made, seen):
    arrays = folders.arrays(made / "hf")
    for key in folders.scaled_weights(made / "hf"):
        weight = in_float64(arrays, key)
        codes, scales = quantize(in_float64(arrays, key, F32), BLOCK)
        change = np.square(in_float64({"": codes, SUFFIX: scales}, "") - weight).sum()
        assert by_key(seen)[key].scaled.errors == pytest.approx(change, rel=1e-6)


def test_scales_by_amax_stay_as_they_are(tmp_path):
    tree = random_hf(CONFIG)
    for key in [key for key in tree if key.endswith(SUFFIX)]:
        weight = key.removesuffix(SUFFIX)
        tree[weight].view(np.uint8)[:: BLOCK[0], :: BLOCK[1]] = 0x7E
        tree[key] = np.exp2(np.round(np.log2(tree[key]))).astype(F32)
    seen = overview(folders.write(tmp_path / "hf", tree, CONFIG))
    assert all(each.scaled.errors == 0 for each in seen.weights if each.scaled)
    assert any("would change none" in text for text in found(seen, level="good"))


def test_floats_are_measured_as_what_fp8_would_make_of_them(made):
    arrays, seen = folders.arrays(made / "hf"), by_key(overview(made / "bf16"))
    assert not overview(made / "bf16").codes.any()
    for key in folders.scaled_weights(made / "hf"):
        weight = dequantize(arrays[key], arrays[key + SUFFIX], BF16, BLOCK)
        amax = np.array([np.abs(part.astype(np.float64)).max() for part in blocks_of(weight).values()])
        assert seen[key].squares == pytest.approx(np.square(weight.astype(np.float64)).sum(), rel=1e-12)
        assert seen[key].scaled.spread == pytest.approx(np.log2(amax.max() / amax.min()), rel=1e-12)
        assert seen[key].scaled.errors == pytest.approx(requantised(weight), rel=1e-9)


def test_a_layout_does_not_change_a_figure(made, seen):
    native = overview(made / "fp8")
    assert by_key(native) == by_key(seen) and np.array_equal(native.codes, seen.codes)
    assert np.array_equal(native.router_bias, seen.router_bias)


def test_outliers_are_the_blocks_far_above_the_median(made, other):
    folders.edit(other, W1 + SUFFIX, lambda scales: scales.view(-1).mul_(torch.eye(6)[4] * 1e4 + 1).view(scales.shape))
    arrays, seen = folders.arrays(other), by_key(overview(other))
    for key in folders.scaled_weights(other):
        amax = {place: np.abs(part).max() for place, part in blocks_of(in_float64(arrays, key)).items()}
        median = np.median(list(amax.values()))
        want = sorted((place for place in amax if amax[place] > 8 * median), key=lambda place: -amax[place])[:4]
        assert [outlier.block for outlier in seen[key].scaled.outliers] == want
        for outlier in seen[key].scaled.outliers:
            assert outlier.amax == pytest.approx(amax[outlier.block]) == pytest.approx(outlier.ratio * median)
    assert seen[W1].scaled.outliers[0].block == divmod(4, arrays[W1 + SUFFIX].shape[1])


def test_a_matrix_of_zeros_has_no_outliers_and_no_spread():
    blocks = float_blocks(np.zeros((200, 300), F32), BLOCK)
    assert list(outliers(blocks)) == [] and blocks.amax.shape == (2, 3) and not blocks.errors.any()


def test_what_is_not_finite_counts_as_zero_and_is_told(made, other):
    def poison(bias):
        bias[2] = float("nan")
        return bias

    folders.edit(other, BIAS, poison)
    folders.flip_bit(other, NORM, 14)
    seen, norm = overview(other), folders.arrays(other)[NORM]
    with np.errstate(invalid="ignore"):  # a signalling NaN
        norm = norm[np.isfinite(norm)].astype(np.float64)
    assert by_key(seen)[NORM].squares == pytest.approx(np.square(norm).sum(), rel=1e-12)
    assert {each.key for each in seen.unusual[0]} >= {BIAS}
    assert any(text == "NaN: 2 numbers" for text in found(seen, level="warning"))
    render(seen)


def test_norms_of_experts_and_how_far_they_are_from_their_layer(made, seen):
    arrays = folders.arrays(made / "hf")
    norms = np.zeros((2, 9))
    for layer, expert in np.ndindex(norms.shape):
        parts = (f"model.layers.{layer}.block_sparse_moe.experts.{expert}.{name}.weight" for name in ("w1", "w2", "w3"))
        norms[layer, expert] = np.linalg.norm(np.concatenate([in_float64(arrays, key).ravel() for key in parts]))
    assert expert_norms(seen) == pytest.approx(norms, rel=1e-12)
    deviation = [np.median(np.abs(row - np.median(row))) * 1.4826 for row in norms]
    wanted = (norms - np.median(norms, axis=1)[:, None]) / np.array(deviation)[:, None]
    assert robust_sigmas(norms) == pytest.approx(wanted)
    bias = [arrays[f"model.layers.{layer}.block_sparse_moe.e_score_correction_bias"] for layer in range(2)]
    assert np.array_equal(seen.router_bias, np.stack(bias).astype(F32))


# --- one pass, in flat memory ----------------------------------------------------------------------------------------


def peak(path):
    source = open_source(path)
    gather(source)
    tracemalloc.start()
    gather(source)
    nbytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return nbytes


def test_memory_does_not_grow_with_the_layers(tmp_path, monkeypatch):
    monkeypatch.setattr(look, "_PIECE_BYTES", 2**18)
    peaks = []
    for layers in (1, 6):
        synthetic.synthesize(tmp_path / str(layers), synthetic.config(layers=layers, experts=40))
        peaks.append(peak(tmp_path / str(layers)))
    more = mj.inspect(tmp_path / "6").total.nbytes - mj.inspect(tmp_path / "1").total.nbytes
    assert peaks[1] - peaks[0] < more / 4
