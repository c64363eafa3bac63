"""Reports: every figure against numpy in float64, the findings that follow, and the page as text."""

import dataclasses
import html
import itertools
import json
import os
import re
import shutil
import sys
import tracemalloc

import folders
import numpy as np
import pytest
import torch
from command_line import run, run_json
from folders import SUFFIX
from helpers import BF16, F32, FP8, config, dequantize, quantize, random_hf
from safetensors.torch import load_file, save_file

import minimax_jax as mj
from minimax_jax import synthetic
from minimax_jax.errors import JobError, LayoutError
from minimax_jax.jobs import look
from minimax_jax.jobs.difference import Difference
from minimax_jax.jobs.figures import float_blocks, outliers
from minimax_jax.jobs.findings import expert_norms, findings, robust_sigmas
from minimax_jax.jobs.measure import gather
from minimax_jax.jobs.overview import Figures, Scaled
from minimax_jax.jobs.source import open_source
from minimax_jax.layout.specs import specs
from minimax_jax.page.render import render

CONFIG = config(num_local_experts=9)
BLOCK = CONFIG.block
MOE = "model.layers.1.block_sparse_moe."
W1, W2 = MOE + "experts.4.w1.weight", MOE + "experts.7.w2.weight"
BIAS = MOE + "e_score_correction_bias"
EMBED, NORM = "model.embed_tokens.weight", "model.norm.weight"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    root = tmp_path_factory.mktemp("made")
    folders.write(root / "hf", random_hf(CONFIG), CONFIG)
    mj.convert(root / "hf", root / "bf16")
    mj.convert(root / "hf", root / "fp8", dtype="fp8")
    return root


@pytest.fixture
def other(made, tmp_path):
    return folders.write(tmp_path / "other", random_hf(CONFIG), CONFIG)


@pytest.fixture(scope="module")
def seen(made):
    return overview(made / "hf")


def overview(*paths):
    return gather(*(open_source(path) for path in paths))


def found(seen, *, level=None):
    return [each.text for each in findings(seen) if level in (None, each.level)]


def by_key(seen):
    return {each.key: each for each in seen.weights}


def in_float64(arrays, key, dtype=np.float64):
    """A weight, FP8 dequantised."""
    if arrays[key].dtype != FP8:
        return arrays[key].astype(dtype)
    rows, cols = arrays[key].shape
    scales = np.repeat(np.repeat(arrays[key + SUFFIX], BLOCK[0], 0), BLOCK[1], 1)[:rows, :cols]
    return arrays[key].astype(dtype) * scales.astype(dtype)


def blocks_of(matrix):
    return {
        (i // BLOCK[0], j // BLOCK[1]): matrix[i : i + BLOCK[0], j : j + BLOCK[1]]
        for i, j in itertools.product(range(0, matrix.shape[0], BLOCK[0]), range(0, matrix.shape[1], BLOCK[1]))
    }


def requantised(weight):
    """What quantising by amax changes, squared and summed, in float64."""
    codes, scales = quantize(weight.astype(F32), BLOCK)
    return np.square(in_float64({"": codes, SUFFIX: scales}, "") - weight.astype(np.float64)).sum()


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


# --- two checkpoints -------------------------------------------------------------------------------------------------


def test_what_changed_is_told_against_the_first(made, other):
    folders.edit(other, W1 + SUFFIX, lambda scales: scales * 1.5)
    folders.edit(other, EMBED, lambda weight: weight * 1.25)
    seen = overview(made / "hf", other)
    before, after = folders.arrays(made / "hf"), folders.arrays(other)
    for key, each in by_key(seen).items():
        a, b = in_float64(before, key, F32).astype(np.float64), in_float64(after, key, F32).astype(np.float64)
        assert each.change.error_squares == pytest.approx(np.square(b - a).sum(), rel=1e-12)
        assert (each.change.differing, each.change.max_abs) == ((a != b).sum(), np.abs(a - b).max())
        assert seen.change([each]) == pytest.approx(np.linalg.norm(b - a) / np.linalg.norm(a), rel=1e-9)
    text = " ".join(found(seen))
    assert f"2 of {len(seen.weights)} weights changed" in text and "1 of 18 experts moved" in text
    assert any(text.startswith("1 of 18") for text in found(seen, level="note"))


def test_the_error_of_quantisation_is_told_against_the_floats(made, tmp_path):
    rng = np.random.default_rng(2)
    tree = random_hf(CONFIG, "BF16")
    for key in tree:
        tree[key] = (rng.standard_normal(tree[key].shape) * 0.02).astype(tree[key].dtype)
    floats = folders.write(tmp_path / "floats", tree, CONFIG.replace(weight_block_size=None))
    mj.convert(floats, tmp_path / "fp8", to="hf-fp8")
    forth, back = overview(floats, tmp_path / "fp8"), overview(tmp_path / "fp8", floats)
    scaled = folders.scaled_weights(tmp_path / "fp8")
    arrays = folders.arrays(tmp_path / "fp8")
    for seen, base in ((forth, 0), (back, 1)):
        assert seen.quantised and seen.base == base
        for key in scaled:
            want = tree[key].astype(np.float64)
            error = dequantize(arrays[key], arrays[key + SUFFIX], BF16, BLOCK).astype(np.float64) - want
            share = np.linalg.norm(error) / np.linalg.norm(want)
            assert seen.change([by_key(seen)[key]]) == pytest.approx(share, rel=1e-9) and 0 < share < 1 / 16
        assert any(text.startswith("Quantisation error") for text in found(seen, level="note"))
        assert "Quantisation error" in render(seen)


def test_the_same_weights_in_another_layout_and_dtype_have_not_changed(made):
    seen = overview(made / "hf", made / "bf16")
    assert seen.change(seen.weights) == 0
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


# --- the page --------------------------------------------------------------------------------------------------------


def figures_of(page):
    return json.loads(re.search(r'id="figures">(.*?)</script>', page, re.DOTALL)[1])


def made_up(config):
    """Figures of all weights of a model, random where a page shows them one by one."""
    random = np.random.default_rng(0)
    for key, place in specs(config).places.items():
        if not place.is_scale:
            first, error = random.random(2)
            yield Figures(
                key=key,
                layer=place.entry.layer,
                expert=place.expert if place.entry.row.grouped else None,
                dtype="F8_E4M3",
                shape=place.entry.part_shape,
                squares=first,
                amax=1.0,
                scaled=Scaled(blocks=1, spread=error, errors=error, saturated=0, zeros=0, outliers=()),
                change=Difference(elements=9, differing=9, first_squares=first, error_squares=error),
            )


def test_a_page_of_the_published_size_is_small(seen):
    whole = synthetic.config(layers=62, experts=256)
    page = render(
        dataclasses.replace(
            seen,
            checkpoints=(dataclasses.replace(seen.checkpoints[0], config=whole),) * 2,
            scaled_dtypes=seen.scaled_dtypes * 2,
            weights=tuple(made_up(whole)),
            router_bias=np.random.default_rng(1).random((62, 256), np.float32),
            unusual=((), ()),
        )
    )
    assert len(page.encode()) < 6_000_000
    assert figures_of(page)["changes"]["data"][0]["z"]["shape"] == "62, 256"


def test_a_page_names_no_place_to_fetch_from_and_runs_no_text_of_a_checkpoint(tmp_path):
    name = "<img src=x onerror=alert(1)>"
    folders.write(tmp_path / name, random_hf(CONFIG), CONFIG)
    page = render(overview(tmp_path / name))
    assert "default-src 'none'" in page and not re.search(r"""(src|href)=["']?(https?:)?//""", page)
    assert "<img" not in page and "&lt;img" in page


def test_a_path_that_is_not_text_is_written_out(made, tmp_path):
    folder = os.fsencode(tmp_path) + b"/h\xff"
    shutil.copytree(os.fsencode(made / "hf"), folder)
    stdout, _ = run("report", os.fsdecode(folder), made / "bf16", "-o", tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert "h\\udcff" in stdout and re.search(r"<title>\S+/h\\udcff and ", page)
    assert f"From {tmp_path}/h\\udcff to" in page


def test_the_command_writes_the_page_and_tells_the_findings(made, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    stdout, stderr = run("report", made / "hf")
    page = (tmp_path / "report.html").read_text()
    for text in found(overview(made / "hf")):
        assert text in stdout and text in html.unescape(page)
    assert stdout.splitlines()[-1].startswith("wrote report.html") and stderr == ""
    told, stderr = run_json("report", made / "hf", made / "bf16", "-o", "two.html", "--workers", 1)
    assert (told["page"], told["bytes"]) == ("two.html", (tmp_path / "two.html").stat().st_size) and stderr == ""
    assert [each["layout"] for each in told["checkpoints"]] == ["hf", "native"]
    assert [each["text"] for each in told["findings"]] == found(overview(made / "hf", made / "bf16"))
    assert {each["level"] for each in told["findings"]} <= {"warning", "note", "good"}


def test_verbose_shows_more_names(made):
    brief, full = (run("report", made / "hf", "-o", made / "page.html", *more)[0] for more in ([], ["-v"]))
    assert len(full.splitlines()) > len(brief.splitlines())


def test_an_old_page_stays_where_there_is_no_new_one(made, tmp_path):
    page = tmp_path / "report.html"
    page.write_text("old")
    _, stderr = run("report", tmp_path / "nothing", "-o", page, code=3)
    assert "nothing" in stderr and page.read_text() == "old"
    with pytest.raises(LayoutError, match="architecture"):
        synthetic.synthesize(tmp_path / "tiny")
        mj.report(made / "hf", tmp_path / "tiny", output=page)
    assert page.read_text() == "old" and [file.name for file in tmp_path.glob(".*")] == []
    with pytest.raises(JobError, match="report cannot be written"):
        mj.report(made / "hf", output=tmp_path / "no folder" / "report.html")


@pytest.mark.parametrize("module", ["plotly.io", "jinja2"])
def test_what_is_not_installed_is_named_before_any_work(made, tmp_path, monkeypatch, module):
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.delitem(sys.modules, "minimax_jax.page.render")
    _, stderr = run("report", tmp_path / "nothing", "-o", tmp_path / "report.html", code=3)
    assert "pip install 'minimax_jax[report]'" in stderr and module in stderr
