"""What conversions say of block scales that they leave behind or derive anew, and that they say it nowhere else."""

import folders
import pytest
import torch
from command_line import run, run_json

import minimax_jax as mj
from minimax_jax import synthetic

CONFIG = synthetic.config(layers=1, experts=2)
FLOATS = ("hf", "orbax", "dcp", "transformers-v5", "maxtext", "maxtext-unscanned")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """One model: as published; in floats with the scales of that beside it, and without; grouped and still FP8."""
    root = tmp_path_factory.mktemp("made")
    synthetic.synthesize(root / "fp8", CONFIG)
    synthetic.synthesize(root / "floats", CONFIG, scaled="BF16")
    mj.convert(root / "fp8", root / "with-scales")
    mj.convert(root / "fp8", root / "native-fp8", dtype="fp8")
    return root


def told(made, tmp_path, source, *options):
    """What `plan` and `convert` remark, level and text; the same text also stands in what people look at."""
    planned = run_json("plan", made / source, *options)[0]["remarks"]
    done = run_json("convert", made / source, tmp_path / "json", *options, "-q")[0]["remarks"]
    shown = run("plan", made / source, *options)[0], run("convert", made / source, tmp_path / "text", *options, "-q")[0]
    for remarks, text in zip((planned, done), shown, strict=True):
        assert sum(line.startswith(("note: ", "warning: ")) for line in text.splitlines()) == len(remarks)
        assert all(f"{remark['level']}: {remark['text']}" in text for remark in remarks)
    return [[(remark["level"], remark["text"]) for remark in remarks] for remarks in (planned, done)]


@pytest.mark.parametrize("source", ["fp8", "with-scales"])
@pytest.mark.parametrize("to", FLOATS)
def test_scales_that_a_target_of_floats_leaves_behind_are_a_note(made, tmp_path, source, to):
    planned, done = told(made, tmp_path, source, "--to", to)
    ((level, text),) = planned
    count = len(folders.scaled_weights(made / "fp8"))
    assert planned == done and level == "note" and f"block scales of {count} weights are not kept" in text
    assert 'to="native" (--to native)' in text


@pytest.mark.parametrize(
    ("source", "options"),
    [
        ("fp8", ["--to", "native"]),
        ("fp8", ["--to", "native", "--dtype", "f32"]),
        ("fp8", ["--to", "native", "--dtype", "fp8"]),
        ("fp8", ["--to", "orbax", "--dtype", "fp8"]),
        ("fp8", ["--to", "hf-fp8"]),
        ("with-scales", ["--to", "native", "--dtype", "f32"]),
        ("with-scales", ["--to", "hf-fp8"]),
        ("with-scales", ["--to", "dcp", "--dtype", "fp8"]),
        ("native-fp8", ["--to", "hf-fp8"]),
        ("floats", ["--to", "native"]),
        ("floats", ["--to", "hf"]),
        ("floats", ["--to", "orbax"]),
    ],
)
def test_where_scales_are_kept_or_there_are_none_nothing_is_said(made, tmp_path, source, options):
    assert told(made, tmp_path, source, *options) == [[], []]


@pytest.mark.parametrize(
    "options", [["--to", "hf-fp8"], ["--to", "native", "--dtype", "fp8"], ["--to", "dcp", "--dtype", "fp8"]]
)
def test_fresh_scales_for_all_weights_are_a_warning_with_a_way_out(made, tmp_path, options):
    planned, done = told(made, tmp_path, "floats", *options)
    ((level, text),) = planned
    assert planned == done and level == "warning"
    assert "no source scale is kept: the source has none" in text and "source_scales.safetensors" in text


def test_scales_that_fit_no_weight_any_more_are_a_warning_and_those_that_fit_some_are_not(made, tmp_path):
    names = [key for key in folders.stored(made / "with-scales") if "_proj" in key]
    moved = tmp_path / "moved"
    mj.convert(made / "with-scales", moved)
    folders.edit(moved, names[0], lambda weight: weight * 1.37)
    assert told(tmp_path, tmp_path / "some", "moved", "--to", "hf-fp8") == [[], []]
    for name in names[1:]:
        folders.edit(moved, name, lambda weight: weight.to(torch.float32).mul(1.37).to(weight.dtype))
    planned, done = told(tmp_path, tmp_path / "all", "moved", "--to", "hf-fp8")
    assert (
        planned == [] and [level for level, _ in done] == ["warning"] and "give none of its weights back" in done[0][1]
    )
