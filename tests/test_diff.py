"""Differences between checkpoints: every figure against numpy in float64, in any two layouts."""

import json
import shutil

import folders
import numpy as np
import pytest
import torch
from command_line import run, run_json
from folders import SUFFIX
from helpers import BF16, F32, FP8, dequantize
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as drawn

import minimax_jax as mj
from minimax_jax import synthetic
from minimax_jax.errors import JobError, LayoutError
from minimax_jax.jobs import difference as differing
from minimax_jax.jobs.compare import Weight
from minimax_jax.jobs.difference import difference

CONFIG = synthetic.config(layers=1, experts=3)
MOE = "model.layers.0.block_sparse_moe."
W1, W2 = MOE + "experts.1.w1.weight", MOE + "experts.2.w2.weight"
GATE_UP = "model.layers.0.mlp.experts.gate_and_up_projs"
EMBED = "model.embed_tokens.weight"
NORM = "model.norm.weight"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    root = tmp_path_factory.mktemp("made")
    synthetic.synthesize(root / "hf", CONFIG, shard_bytes=60_000)
    mj.convert(root / "hf", root / "fp8", dtype="fp8")
    mj.convert(root / "hf", root / "bf16")
    mj.convert(root / "hf", root / "f32", to="hf", dtype="f32")
    return root


@pytest.fixture
def other(made, tmp_path):
    return shutil.copytree(made / "hf", tmp_path / "other")


# --- the figures, against float64 ------------------------------------------------------------------------------------


def steps(a, b):
    """How many numbers of their dtype lie from one to the other, one by one, by numpy's own `nextafter`."""
    low, high = min(a, b), max(a, b)
    count = 0
    while low < high:
        low = np.nextafter(low, high)
        count += 1
    return count


def oracle(a, b):
    """What the figures mean, in the plainest float64."""
    x, y = a.astype(np.float64).ravel(), b.astype(np.float64).ravel()
    same = (x == y) | (np.isnan(x) & np.isnan(y))
    finite = np.isfinite(x) & np.isfinite(y)
    counts = (x.size, int((~same).sum()), int((~same & ~finite).sum()))
    x, y = x[finite], y[finite]
    norms = np.linalg.norm(x), np.linalg.norm(y)
    relative = np.linalg.norm(x - y) / max(norms) if max(norms) else 0.0
    cosine = np.dot(x, y) / (norms[0] * norms[1]) if min(norms) else float(np.array_equal(x, y))
    return counts, relative, cosine, np.abs(x - y).max(initial=0.0)


def check(found, a, b):
    counts, relative, cosine, max_abs = oracle(a, b)
    assert (found.elements, found.differing, found.non_finite) == counts
    assert found.relative == pytest.approx(relative, rel=1e-12, abs=1e-300)
    assert found.cosine == pytest.approx(cosine, abs=1e-12)
    assert found.max_abs == max_abs


floats16 = drawn.arrays(np.uint16, 40, elements=st.integers(0, 2**16 - 1))
ordinary = drawn.arrays(np.float32, 40, elements=st.floats(-1e9, 1e9, width=32))


@settings(deadline=None, max_examples=60)
@given(floats16, floats16)
def test_any_bits_of_bfloat16(a, b):
    a, b = a.view(BF16), b.view(BF16)
    a[:7], b[:7] = 0, [0, -0.0, 1, np.nan, np.inf, -np.inf, 3]
    with np.errstate(invalid="ignore"):
        check(difference(Weight(values=a), Weight(values=b)), a, b)


@settings(deadline=None, max_examples=60)
@given(ordinary, st.integers(0, 39), st.integers(-3, 3))
def test_steps_of_the_last_place(a, at, count):
    b = a.copy()
    for _ in range(abs(count)):
        b[at] = np.nextafter(b[at], F32.type(np.copysign(np.inf, count)))
    found = difference(Weight(values=a), Weight(values=b))
    assert found.max_ulp == steps(a[at], b[at]) == abs(count)
    check(found, a, b)


@pytest.mark.parametrize(
    ("a", "b"), [(1e-40, -1e-40), (-0.0, 1.4e-45), (0.0, -0.0), (1.0, 1.0000001), (-2.0, -1.9999999)]
)
def test_steps_across_zero_and_among_subnormals(a, b):
    a, b = F32.type(a), F32.type(b)
    ulp = difference(Weight(values=np.full(1, a)), Weight(values=np.full(1, b))).max_ulp
    a64, b64 = int(np.abs(a) / np.float64(2**-149)), int(np.abs(b) / np.float64(2**-149))
    assert ulp == (a64 + b64 if abs(a) < 1e-38 else steps(a, b))


@pytest.mark.parametrize(
    ("a", "b", "relative", "cosine"),
    [
        ([0, 0], [0, 0], 0, 1),
        ([0, 0], [3, 4], 1, 0),
        ([3, 4], [0, 0], 1, 0),
        ([1, 0], [0, 1], 2**0.5, 0),
        ([1, 2], [-1, -2], 2, -1),
        ([1, np.inf], [1, np.inf], 0, 1),
        ([1, np.nan], [1, 2], 0, 1),
    ],
)
def test_zeros_and_what_is_not_finite_give_figures_all_the_same(a, b, relative, cosine):
    found = difference(Weight(values=np.array(a, F32)), Weight(values=np.array(b, F32)))
    assert (found.relative, found.cosine) == (pytest.approx(relative), pytest.approx(cosine))
    json.dumps([found.relative, found.cosine, found.max_abs], allow_nan=False)


def test_fp8_against_its_own_bf16_and_against_another():
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 255, (200, 300), dtype=np.uint8) & 0xFE
    codes, scales = codes.view(FP8), rng.lognormal(-8, 1, (2, 3)).astype(F32)
    first, exact = Weight(values=codes, scales=scales, block=(128, 128)), dequantize(codes, scales, BF16)
    assert difference(first, Weight(values=exact)).differing == 0
    moved = exact.copy()
    moved[3, 5] *= BF16.type(2)
    moved[150, 299] = np.nan
    found = difference(first, Weight(values=moved))
    check(found, exact, moved)
    assert (found.differing, found.non_finite) == (2, 1)
    other = Weight(values=codes, scales=scales * F32.type(1.5), block=(128, 128))
    check(difference(first, other), dequantize(codes, scales, F32), dequantize(codes, scales * F32.type(1.5), F32))


def test_pieces_give_what_the_whole_gives(monkeypatch):
    rng = np.random.default_rng(1)
    a = rng.standard_normal((50, 60)).astype(F32)
    b = a + rng.standard_normal((50, 60)).astype(F32) * 1e-3
    b[:20] = a[:20]
    monkeypatch.setattr(differing, "_AT_ONCE", 77)
    check(difference(Weight(values=a), Weight(values=b)), a, b)
    rows = [(Weight(values=a[at : at + 7]), Weight(values=b[at : at + 7])) for at in range(0, 50, 7)]
    check(differing.total(difference(*pair, part=True) for pair in rows), a, b)


# --- checkpoints -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("names", [("hf", "fp8"), ("hf", "bf16"), ("f32", "fp8"), ("bf16", "f32"), ("bf16", "hf")])
def test_the_same_values_in_any_two_layouts_do_not_differ(made, names):
    seen = mj.diff(*(made / name for name in names))
    weights = [key for key in folders.stored(made / "hf") if not key.endswith(SUFFIX)]
    assert seen.same and seen.weights == len(weights) and seen.differing == 0
    assert seen.elements == sum(array.size for key, array in folders.arrays(made / "f32").items())


def test_differences_are_ranked_and_their_figures_right(made, other):
    folders.edit(other, EMBED, lambda weight: weight * 1.01)
    folders.edit(other, NORM, lambda weight: -weight)
    folders.edit(other, W1 + SUFFIX, lambda scales: scales * 2)
    seen = mj.diff(other, made / "bf16")
    assert [weight.key for weight in seen.differences] == [NORM, W1, EMBED] and not seen.same
    assert seen.layouts == ("hf", "native") and seen.differences[1].dtypes == ("F8_E4M3", "BF16")
    arrays, before = folders.arrays(other), folders.arrays(made / "hf")
    for weight in seen.differences:
        a, b = arrays[weight.key], before[weight.key]
        if a.dtype == FP8:
            a, b = (dequantize(array, of[W1 + SUFFIX], BF16) for array, of in ((a, arrays), (b, before)))
        check(weight.figures, a, b)
    by_ulp = mj.diff(other, made / "bf16", rank="ulp").differences
    assert [weight.figures.max_ulp for weight in by_ulp] == sorted((w.figures.max_ulp for w in by_ulp), reverse=True)
    assert by_ulp[0].key == NORM and by_ulp[1].figures.max_ulp == 128  # a factor of 2 in bf16, which has 7 bits
    assert mj.diff(other, made / "bf16", rank="cosine").differences[0].key == NORM
    assert seen.differing == sum(weight.figures.differing for weight in seen.differences)


def test_a_nan_comes_before_everything(made, tmp_path):
    native = shutil.copytree(made / "bf16", tmp_path / "native")
    folders.edit(native, NORM, lambda weight: weight * 100)

    def poison(grouped):
        grouped[2, 5, 7] = float("nan")  # of expert 2, in gate
        return grouped

    folders.edit(native, GATE_UP, poison)
    seen = mj.diff(made / "hf", native)
    assert [weight.key for weight in seen.differences] == [MOE + "experts.2.w1.weight", NORM]
    assert (seen.differences[0].figures.non_finite, seen.differences[0].figures.relative) == (1, 0.0)


def test_large_tensors_in_pieces(made, other, monkeypatch):
    def change(weight):
        weight[200] *= 2
        return weight

    folders.edit(other, EMBED, change)
    whole = mj.diff(made / "hf", other)
    monkeypatch.setattr("minimax_jax.jobs.look._PIECE_BYTES", 5000)
    (again,), (before,) = mj.diff(made / "hf", other).differences, whole.differences
    assert again.figures.relative == pytest.approx(before.figures.relative, rel=1e-12)
    check(again.figures, folders.arrays(made / "hf")[EMBED], folders.arrays(other)[EMBED])


def test_what_cannot_be_compared_is_refused(made, tmp_path):
    synthetic.synthesize(tmp_path / "larger", synthetic.config(layers=2, experts=3), sparse=True)
    with pytest.raises(LayoutError, match="not of the same architecture"):
        mj.diff(made / "hf", tmp_path / "larger")
    with pytest.raises(JobError, match="no such rank"):
        mj.diff(made / "hf", made / "hf", rank="colour")


# --- the command -----------------------------------------------------------------------------------------------------


def test_the_command_tells_differences_and_exits_with_1(made, other):
    folders.edit(other, EMBED, lambda weight: weight * 1.01)
    folders.edit(other, W2, lambda weight: torch.zeros_like(weight))
    told, stderr = run_json("diff", made / "fp8", other, code=1)
    assert not told["same"] and [weight["key"] for weight in told["differences"]] == [W2, EMBED] and stderr == ""
    assert (told["differences"][0]["relative"], told["differences"][0]["cosine"]) == (1.0, 0.0)
    assert told["weights"] == {"compared": mj.diff(made / "fp8", other).weights, "different": 2}
    stdout, _ = run("diff", made / "fp8", other, "--top", 1, code=1)
    assert W2 in stdout and EMBED not in stdout and "and 1 more" in stdout and "NOT the same: 2 of" in stdout
    assert EMBED in run("diff", made / "fp8", other, "--top", 1, "-v", code=1)[0]
    assert run("diff", made / "hf", made / "fp8")[0].endswith("the same\n")
    sampled, _ = run_json("diff", made / "hf", made / "fp8", "--sample", "3")
    assert sampled["sample"]["entries"] == 3 and sampled["same"]
    assert "share" in run("diff", made / "hf", other, "--sample", "none", code=2)[1]
