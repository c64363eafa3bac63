"""Findings of reports: what changed between two checkpoints, and which rules speak when."""

import folders
import numpy as np
import pytest
import torch
from folders import SUFFIX
from helpers import BF16, F32, FP8, dequantize, random_hf
from report_cases import BIAS, BLOCK, CONFIG, EMBED, NORM, W1, W2, by_key, found, in_float64, make, overview
from safetensors.torch import load_file, save_file

import minimax_jax as mj
from minimax_jax import synthetic
from minimax_jax.jobs.findings import findings
from minimax_jax.jobs.overview import relative_change
from minimax_jax.page.render import render


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return make(tmp_path_factory.mktemp("made"))


@pytest.fixture
def other(made, tmp_path):
    return folders.write(tmp_path / "other", random_hf(CONFIG), CONFIG)


# --- two checkpoints -------------------------------------------------------------------------------------------------


def apart(a, b):
    """Norm of the difference over the larger of the two norms, in float64."""
    return np.linalg.norm(a - b) / max(np.linalg.norm(a), np.linalg.norm(b))


def test_what_changed_is_told_against_the_larger_norm(made, other):
    folders.edit(other, W1 + SUFFIX, lambda scales: scales * 1.5)
    folders.edit(other, EMBED, lambda weight: weight * 1.25)
    seen = overview(made / "hf", other)
    before, after = folders.arrays(made / "hf"), folders.arrays(other)
    for key, each in by_key(seen).items():
        a, b = in_float64(before, key, F32).astype(np.float64), in_float64(after, key, F32).astype(np.float64)
        assert each.change.error_squares == pytest.approx(np.square(b - a).sum(), rel=1e-12)
        assert (each.change.differing, each.change.max_abs) == ((a != b).sum(), np.abs(a - b).max())
        assert relative_change([each]) == pytest.approx(apart(a, b), rel=1e-9)
    text = " ".join(found(seen))
    assert f"2 of {len(seen.weights)} weights changed" in text and "1 of 18 experts moved" in text
    assert any(text.startswith("1 of 18") for text in found(seen, level="note"))


@pytest.mark.parametrize("factor", [0.75, 1.5])
def test_report_and_diff_tell_one_relative_difference(made, other, factor):
    folders.edit(other, W1 + SUFFIX, lambda scales: scales * factor)
    folders.edit(other, EMBED, lambda weight: weight * factor)
    seen, listed = by_key(overview(made / "hf", other)), mj.diff(made / "hf", other).differences
    before, after = folders.arrays(made / "hf"), folders.arrays(other)
    assert {weight.key for weight in listed} == {W1, EMBED}
    for weight in listed:
        a, b = (in_float64(arrays, weight.key, F32).astype(np.float64) for arrays in (before, after))
        assert relative_change([seen[weight.key]]) == weight.figures.relative == pytest.approx(apart(a, b), rel=1e-9)
    expert = [seen[W1.replace("w1", name)] for name in ("w1", "w2", "w3")]
    wholes = [np.concatenate([in_float64(tree, each.key).ravel() for each in expert]) for tree in (before, after)]
    assert relative_change(expert) == pytest.approx(apart(*wholes), rel=1e-6)


def test_the_error_of_quantisation_is_the_same_either_way_round(made, tmp_path):
    rng = np.random.default_rng(2)
    tree = random_hf(CONFIG, "BF16")
    for key in tree:
        tree[key] = (rng.standard_normal(tree[key].shape) * 0.02).astype(tree[key].dtype)
    floats = folders.write(tmp_path / "floats", tree, CONFIG.replace(weight_block_size=None))
    mj.convert(floats, tmp_path / "fp8", to="hf-fp8")
    forth, back = overview(floats, tmp_path / "fp8"), overview(tmp_path / "fp8", floats)
    scaled = folders.scaled_weights(tmp_path / "fp8")
    arrays = folders.arrays(tmp_path / "fp8")
    for seen in (forth, back):
        assert seen.quantised
        for key in scaled:
            want = tree[key].astype(np.float64)
            share = apart(dequantize(arrays[key], arrays[key + SUFFIX], BF16, BLOCK).astype(np.float64), want)
            assert relative_change([by_key(seen)[key]]) == pytest.approx(share, rel=1e-9) and 0 < share < 1 / 16
        assert any(text.startswith("Quantisation error") for text in found(seen, level="note"))
        assert "Quantisation error" in render(seen)


def test_the_same_weights_in_another_layout_and_dtype_have_not_changed(made):
    seen = overview(made / "hf", made / "bf16")
    assert relative_change(seen.weights) == 0
    assert any(text.startswith("Nothing changed") for text in found(seen, level="good"))
    render(seen)


def test_a_number_against_a_nan_is_a_warning(made, other):
    def poison(weight):
        weight[0] = float("nan")
        return weight

    folders.edit(other, NORM, poison)
    seen = overview(made / "hf", other)
    assert any("numbers that only one of them has" in text for text in found(seen, level="warning"))


# --- findings --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "change", "level", "text", "good"),
    [
        (W2, torch.zeros_like, "warning", "1 matrix", "No dead expert"),
        (W1 + SUFFIX, lambda scales: scales * 1e3, "note", "1 expert with a norm far", "No expert has a norm far"),
        (W1 + SUFFIX, lambda scales: -scales, "warning", "Negative scale: 6 numbers", "No NaN"),
        (BIAS, torch.ones_like, "note", "Router bias without effect in 1 layer", None),
    ],
)
def test_a_finding_is_made_when_its_rule_holds_and_not_before(tmp_path, key, change, level, text, good):
    tree = random_hf(CONFIG)
    for scale in [scale for scale in tree if scale.endswith(SUFFIX)]:
        tree[scale] = np.full_like(tree[scale], 2**-8)
    sound = folders.write(tmp_path / "sound", tree, CONFIG)
    before = overview(sound)
    assert not any(text in told for told in found(before, level=level))
    assert good is None or any(told.startswith(good) for told in found(before, level="good"))
    folders.edit(sound, key, change)
    after = overview(sound)
    assert any(text in told for told in found(after, level=level))
    assert good is None or not any(told.startswith(good) for told in found(after, level="good"))
    render(after)


def test_codes_at_the_end_of_the_range_are_a_warning_beyond_one_in_each_block(tmp_path):
    def saturate(codes):
        codes.view(torch.uint8)[: codes.shape[0] // 8] = 0x7E
        return codes

    tree = random_hf(CONFIG)
    for codes in (array.view(np.uint8) for array in tree.values() if array.dtype == FP8):
        codes[codes & 0x7F == 0x7E] -= 8
        codes[:: BLOCK[0], :: BLOCK[1]] = 0x7E
    folder = folders.write(tmp_path / "hf", tree, CONFIG)
    assert any(text.startswith("No saturated matrix") for text in found(overview(folder), level="good"))
    folders.edit(folder, W1, saturate)
    assert any(text.startswith("Saturated codes in 1 matrix") for text in found(overview(folder), level="warning"))


def test_made_up_weights_and_evenly_spread_ones_are_not_saturated(tmp_path):
    synthetic.synthesize(tmp_path / "codes")
    tree, rng = random_hf(CONFIG, "F32"), np.random.default_rng(0)
    for key in (key.removesuffix(SUFFIX) for key in random_hf(CONFIG) if key.endswith(SUFFIX)):
        tree[key] = rng.uniform(-1, 1, tree[key].shape).astype(F32)
    mj.convert(folders.write(tmp_path / "floats", tree, CONFIG), tmp_path / "even", to="hf-fp8")
    for name in ("codes", "even"):
        assert any(text.startswith("No saturated matrix") for text in found(overview(tmp_path / name), level="good"))


def test_what_is_left_out_is_told(other):
    file = other / "model.safetensors"
    save_file(load_file(file) | {"vision.patch.weight": torch.ones(2, 3)}, file, {"format": "pt"})
    seen = mj.report(other, output=other / "report.html", leave_out=["vision"])
    (finding,) = (each for each in findings(seen) if "leave out" in each.text)
    assert finding.names == ("vision.patch.weight",) and "1 tensor" in finding.text and finding.level == "note"
    assert "vision.patch.weight" in (other / "report.html").read_text()


def test_no_file_but_an_earlier_report_is_replaced(tmp_path):
    mj.synthesize(tmp_path / "tiny")
    (tmp_path / "mine.html").write_text("<!doctype html>\n<html></html>")
    for other in (tmp_path / "tiny" / "config.json", tmp_path / "mine.html"):
        before = other.read_bytes()
        with pytest.raises(mj.JobError, match="a file that is no report stands there"):
            mj.report(tmp_path / "tiny", output=other)
        assert other.read_bytes() == before
    for _ in range(2):
        mj.report(tmp_path / "tiny", output=tmp_path / "page.html")
