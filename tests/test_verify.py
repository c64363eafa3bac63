"""Verification: what is identical, equal or different."""

import json
import math
import shutil

import folders
import numpy as np
import pytest
import torch
from folders import SUFFIX
from form_cases import CONFIG
from hypothesis import given, settings
from hypothesis import strategies as st

import minimax_jax as mj
from minimax_jax.jobs.view import View

MOE = "model.layers.0.block_sparse_moe."
W1 = MOE + "experts.1.w1.weight"
GATE_UP = "model.layers.0.mlp.experts.gate_and_up_projs"
EMBED = "model.embed_tokens.weight"


def relations(seen):
    return {comparison.key: comparison.relation for comparison in seen.comparisons}


def failed(seen):
    return {comparison.key for comparison in seen.failures}


@pytest.mark.parametrize("other", ["hf", "one-file", "fp8"])
def test_the_same_bytes_are_identical_in_any_layout_and_sharding(forms, other):
    for pair in [("hf", other), (other, "hf")]:
        seen = mj.verify(*(forms / name for name in pair), by="bytes")
        assert seen.good and seen.by == "bytes"
        weights = {key for key in folders.stored(forms / "hf") if not key.endswith(SUFFIX)}
        assert relations(seen) == dict.fromkeys(weights, "identical")
        assert [digested.path for digested in seen.checkpoints] == [forms / name for name in pair]


@pytest.mark.parametrize("other", ["bf16", "f32", "hf-bf16"])
def test_fp8_and_floats_are_equal_by_value_and_not_by_bytes(forms, other):
    by_value, by_bytes = mj.verify(forms / "hf", forms / other), mj.verify(forms / other, forms / "hf", by="bytes")
    scaled = folders.scaled_weights(forms / "hf")
    assert by_value.good and not by_bytes.good
    assert {key for key, relation in relations(by_value).items() if relation == "equal"} == scaled
    assert {key for key, relation in relations(by_bytes).items() if relation == "identical"} == set(
        relations(by_bytes)
    ) - scaled
    assert failed(by_bytes) == scaled and failed(by_value) == set()
    assert by_value.count("equal") == by_bytes.count("equal") == len(scaled)
    assert {comparison.dtypes for comparison in by_bytes.failures} == {("F32" if other == "f32" else "BF16", "F8_E4M3")}


def test_bf16_is_equal_to_f32_only_once_f32_is_rounded(forms, tmp_path):
    assert mj.verify(forms / "bf16", forms / "f32").good
    mj.convert(forms / "bf16", tmp_path / "rounded", dtype="f32")
    assert mj.verify(forms / "bf16", tmp_path / "rounded").good
    seen = mj.verify(forms / "f32", tmp_path / "rounded")
    assert failed(seen) == folders.scaled_weights(forms / "hf")


def test_a_difference_is_counted_and_measured(forms, tmp_path):
    shutil.copytree(forms / "bf16", tmp_path / "other")

    def change(weight):
        weight[1, 7, 3] += 0.5
        weight[1, 8, 4] -= 2.0
        return weight

    folders.edit(tmp_path / "other", GATE_UP, change)
    seen = mj.verify(forms / "bf16", tmp_path / "other")
    (difference,) = seen.failures
    was, got = (folders.arrays(path)[GATE_UP].astype(np.float32) for path in (forms / "bf16", tmp_path / "other"))
    assert difference.key == W1 and difference.relation == "different" and difference.differing == 2
    assert difference.max_abs == np.abs(got - was).max() and 1.9 < difference.max_abs < 2.1
    assert not seen.good and not mj.verify(forms / "hf", tmp_path / "other").good


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_nan_and_infinity_are_differences_that_json_can_hold(forms, tmp_path, value):
    shutil.copytree(forms / "bf16", tmp_path / "other")
    folders.edit(tmp_path / "other", EMBED, lambda weight: weight.index_fill_(0, torch.tensor([5]), value))
    seen = mj.verify(forms / "hf", tmp_path / "other", output=tmp_path / "certificate.json")
    (difference,) = json.loads((tmp_path / "certificate.json").read_bytes())["differences"]
    assert difference["key"] == EMBED and difference["max_abs"] is None and not seen.good
    assert difference["differing_elements"] == CONFIG.hidden_size
    assert mj.verify(tmp_path / "other", tmp_path / "other").good  # NaN is equal to NaN here


def test_two_infinities_of_one_sign_are_equal_and_of_two_are_not(forms, tmp_path):
    for name, sign in [("plus", 1), ("also plus", 1), ("minus", -1)]:
        shutil.copytree(forms / "bf16", tmp_path / name)
        folders.edit(tmp_path / name, EMBED, lambda w, sign=sign: w.index_fill_(0, torch.tensor([5]), sign * math.inf))
    assert mj.verify(tmp_path / "plus", tmp_path / "also plus").good
    assert failed(mj.verify(tmp_path / "plus", tmp_path / "minus")) == {EMBED}


def test_numbers_too_far_apart_for_a_float_are_different(forms, tmp_path):
    for name, value in [("large", 3e38), ("small", -3e38)]:
        shutil.copytree(forms / "bf16", tmp_path / name)
        folders.edit(tmp_path / name, EMBED, lambda w, value=value: w.index_fill_(0, torch.tensor([5]), value))
    (difference,) = mj.verify(tmp_path / "large", tmp_path / "small").failures
    assert difference.max_abs == math.inf and difference.differing == CONFIG.hidden_size


def test_any_nan_is_nan_by_value_only(forms, tmp_path):
    for name, bits in [("one", 0x7FC0), ("another", 0x7FC1)]:
        shutil.copytree(forms / "bf16", tmp_path / name)
        folders.edit(tmp_path / name, EMBED, lambda w, bits=bits: with_bits(w, bits))
    assert relations(mj.verify(tmp_path / "one", tmp_path / "another"))[EMBED] == "equal"
    assert failed(mj.verify(tmp_path / "one", tmp_path / "another", by="bytes")) == {EMBED}


def with_bits(weight, bits):
    weight.view(torch.int16)[3, 4] = bits
    return weight


def test_a_signalling_nan_raises_no_alarm(forms, tmp_path):
    shutil.copytree(forms / "bf16", tmp_path / "other")
    folders.edit(tmp_path / "other", EMBED, lambda weight: with_bits(weight, 0x7F81))
    assert failed(mj.verify(forms / "bf16", tmp_path / "other")) == {EMBED}


def test_minus_zero_is_zero_by_value_only(forms, tmp_path):
    for name, zero in [("plus", 0.0), ("minus", -0.0)]:
        shutil.copytree(forms / "bf16", tmp_path / name)
        folders.edit(tmp_path / name, EMBED, lambda w, zero=zero: w.index_fill_(0, torch.tensor([5]), zero))
    assert mj.verify(tmp_path / "plus", tmp_path / "minus").good
    assert failed(mj.verify(tmp_path / "plus", tmp_path / "minus", by="bytes")) == {EMBED}


PLACES = ["hf", "fp8", "bf16"]


@given(st.data())
@settings(max_examples=25, deadline=None)
def test_one_flipped_bit_anywhere_is_found_and_named(forms, tmp_path_factory, data):
    name = data.draw(st.sampled_from(PLACES))
    tensors = folders.stored(forms / name)
    key = data.draw(st.sampled_from(sorted(tensors)))
    bit = data.draw(st.integers(0, 8 * len(tensors[key][2]) - 1))
    other = tmp_path_factory.mktemp("flipped") / name
    shutil.copytree(forms / name, other)
    folders.flip_bit(other, key, bit)
    seen = mj.verify(forms / name, other, by="bytes")
    named = weight_of(tensors, key, bit)
    assert failed(seen) == {named} and not seen.good
    was, got = ({d.key: d.sha256 for d in checkpoint.digests} for checkpoint in seen.checkpoints)
    changed = {digest for digest in was if was[digest] != got[digest]}
    assert changed == {named + SUFFIX if key.endswith(SUFFIX) else named}
    assert seen.checkpoints[0].sha256 != seen.checkpoints[1].sha256
    shutil.rmtree(other)


def weight_of(tensors, key, bit):
    """The Hugging Face name of the weight that a bit of a stored tensor belongs to."""
    native = key.removesuffix(SUFFIX)
    _, shape, data = tensors[key]
    if native.endswith(("gate_and_up_projs", "down_projs")):
        itemsize = len(data) // math.prod(shape)
        expert, _, col = np.unravel_index(bit // 8 // itemsize, shape)
        part = "w2" if native.endswith("down_projs") else "w1" if col < shape[2] // 2 else "w3"
        return f"{MOE}experts.{expert}.{part}.weight"
    moved = {"gate.weight": "gate.weight", "gate.e_score_correction_bias": "e_score_correction_bias"}
    prefix, _, last = native.partition(".mlp.")
    return f"{prefix}.block_sparse_moe.{moved[last]}" if last else native


def test_large_tensors_are_compared_in_pieces(forms, tmp_path, monkeypatch):
    whole = {name: mj.verify(forms / name) for name in ("hf", "bf16", "f32")}
    pairs = {(a, b): mj.verify(forms / a, forms / b) for a, b in [("hf", "f32"), ("f32", "bf16"), ("fp8", "hf")]}
    shutil.copytree(forms / "hf", tmp_path / "other")
    folders.edit(tmp_path / "other", EMBED, to_float32_but_for_one)
    different = mj.verify(forms / "hf", tmp_path / "other")
    sizes = []
    rows = View.rows
    monkeypatch.setattr(View, "rows", lambda *of: sizes.append((chunk := rows(*of)).nbytes) or chunk)
    for piece_bytes in (1, 5000, 70_000):
        monkeypatch.setattr("minimax_jax.jobs.look._PIECE_BYTES", piece_bytes)
        assert {name: mj.verify(forms / name) for name in whole} == whole
        assert {pair: mj.verify(forms / pair[0], forms / pair[1]) for pair in pairs} == pairs
        assert mj.verify(forms / "hf", tmp_path / "other") == different
        assert max(sizes) <= max(piece_bytes, CONFIG.hidden_size * 4)
        sizes.clear()
    (difference,) = different.failures
    assert (difference.key, difference.dtypes, difference.differing) == (EMBED, ("BF16", "F32"), 1)


def to_float32_but_for_one(weight):
    weight = weight.float()
    weight[100, 3] += 1
    return weight
