import re

import jax
import numpy as np
import pytest
from conversion_cases import DOWN, GATE_UP, SMALL, W1, W2, W3, Q, keys_of
from helpers import BF16, SUFFIX, bits, differences, random_hf

import minimax_jax as mj
from minimax_jax.errors import LayoutError, NumericError


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_weights_that_hold_no_number_are_named(value):
    native = {key: np.array(leaf) for key, leaf in mj.from_hf(random_hf(SMALL), SMALL).items()}
    native[GATE_UP][1, 3, SMALL.intermediate_size + 5] = value
    native[Q][0, 0] = value
    with pytest.raises(NumericError) as error:
        mj.to_hf(native, SMALL, quantization=True)
    assert [problem.key for problem in error.value.problems] == [Q, W3]
    assert mj.to_hf(native, SMALL)[W3].shape == (SMALL.intermediate_size, SMALL.hidden_size)
    left_out = mj.to_hf(native, SMALL, quantization=True, exclude_key_regex=f"{re.escape(Q)}|{re.escape(W3)}")
    assert W1 in left_out and W3 not in left_out


def test_weights_that_hold_no_number_poison_their_scales_under_a_trace():
    native = {key: np.array(leaf) for key, leaf in mj.from_hf(random_hf(SMALL), SMALL).items()}
    clean = jax.jit(lambda tree: mj.to_hf(tree, SMALL, quantization=True))
    want = {key: np.array(array) for key, array in clean(native).items()}
    native[GATE_UP][1, 3, SMALL.intermediate_size + 20] = np.nan
    fp8 = clean(native)
    poisoned = np.zeros_like(want[W3 + SUFFIX], bool)
    poisoned[20 // 16, 3 // 8] = True
    assert np.array_equal(np.isnan(fp8[W3 + SUFFIX]), poisoned)
    others = [key for key in want if key not in (W3, W3 + SUFFIX)]
    assert all(np.array_equal(bits(fp8[key]), bits(want[key])) for key in others)


def test_source_scales_do_not_hide_a_nan():
    hf = random_hf(SMALL)
    native = {key: np.array(leaf) for key, leaf in mj.from_hf(hf, SMALL).items()}
    native[DOWN][1, 0, 0] = np.nan
    with pytest.raises(NumericError) as error:
        mj.to_hf(native, SMALL, quantization=True, scales=mj.source_scales(hf, SMALL))
    assert keys_of(error) == {W2}


def test_fp8_weights_with_nan_codes_or_scales_pass_as_they_are():
    hf = random_hf(SMALL)
    bits(hf[W1])[0, 0] = 0x7F
    hf[W2 + SUFFIX][0, 0] = np.nan
    assert not differences(mj.to_hf(mj.from_hf(hf, SMALL, dtype=None), SMALL, quantization=True), hf)
    assert np.isnan(np.asarray(mj.from_hf(hf, SMALL)[GATE_UP])[1, 0, 0])


def test_partial_trees_are_refused_unless_allowed():
    hf = random_hf(SMALL)
    some = {key: array for key, array in hf.items() if ".experts." in key or key == Q or key == Q + SUFFIX}
    with pytest.raises(LayoutError, match="missing tensor") as error:
        mj.from_hf(some, SMALL)
    assert "lm_head.weight" in keys_of(error)
    native = mj.from_hf(some, SMALL, partial=True)
    assert set(native) == {GATE_UP, DOWN, Q}
    with pytest.raises(LayoutError, match="missing tensor"):
        mj.to_hf(native, SMALL, quantization=True)
    scales = mj.source_scales(some, SMALL, partial=True)
    assert not differences(mj.to_hf(native, SMALL, quantization=True, scales=scales, partial=True), some)
    assert mj.from_hf({}, SMALL, partial=True) == {}


@pytest.mark.parametrize("lost", [W1, W1 + SUFFIX, Q + SUFFIX], ids=["an expert", "its scales", "other scales"])
def test_half_a_native_tensor_is_refused_even_in_a_partial_tree(lost):
    hf = random_hf(SMALL)
    del hf[lost]
    with pytest.raises(LayoutError) as error:
        mj.from_hf(hf, SMALL, partial=True)
    assert any(key.startswith(lost.removesuffix(SUFFIX)) for key in keys_of(error))


def test_the_other_layout_is_refused():
    hf = random_hf(SMALL)
    native = mj.from_hf(hf, SMALL)
    with pytest.raises(LayoutError, match="other layout"):
        mj.from_hf(native, SMALL)
    with pytest.raises(LayoutError, match="other layout"):
        mj.to_hf(hf, SMALL)
    with pytest.raises(LayoutError, match="other layout"):
        mj.convert_single_tensor_to_hf(W1, hf[W1].astype(BF16), SMALL)


def test_leaves_that_are_no_arrays_are_all_named():
    hf = random_hf(SMALL) | {Q: [1, 2], W1: "text"}
    with pytest.raises(LayoutError, match="not an array") as error:
        mj.from_hf(hf, SMALL)
    assert keys_of(error) == {Q, W1}
