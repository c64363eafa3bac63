import re

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conversion_cases import CONFIGS, DOWN, DTYPES, GATE_UP, MOE, RAGGED, SMALL, W1, W3, Q, abstract, keys_of
from helpers import BF16, SUFFIX, bits, differences, random_hf

import minimax_jax as mj
from minimax_jax.errors import LayoutError

# --- to_hf ------------------------------------------------------------------------------------------------------------


@DTYPES
def test_to_hf_undoes_from_hf(dtype):
    for cfg in (SMALL, CONFIGS["a batch and a rest"]):
        hf = random_hf(cfg, "F32" if dtype is jnp.float32 else "BF16")
        assert not differences(mj.to_hf(mj.from_hf(hf, cfg, dtype=dtype), cfg), hf)
    hf = random_hf(SMALL, "F32" if dtype is jnp.float32 else "BF16")
    jitted = jax.jit(lambda tree: mj.to_hf(tree, SMALL))(mj.from_hf(hf, SMALL, dtype=dtype))
    assert not differences(jitted, hf)


@pytest.mark.parametrize("source", ["BF16", "F32"])
@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
def test_fp8_export_is_what_numpy_makes(jit, source):
    cfg = SMALL if jit else RAGGED
    hf = random_hf(cfg, source)
    hf[W3][:] = 0
    native = mj.from_hf(hf, cfg, dtype=hf[W3].dtype)
    export = lambda tree: mj.to_hf(tree, cfg, quantization=True)  # noqa: E731
    fp8 = (jax.jit(export) if jit else export)(native)
    want = {}
    for key, array in hf.items():
        want[key] = array
        if key + SUFFIX in fp8:
            want[key], want[key + SUFFIX] = helpers.quantize(array, cfg.block)
    assert {key for key in want if key.endswith(SUFFIX)} == {key for key in random_hf(cfg) if key.endswith(SUFFIX)}
    assert not differences(fp8, want)


@pytest.mark.parametrize(("name", "dtype"), [*((name, jnp.bfloat16) for name in CONFIGS), ("ragged", jnp.float32)])
def test_source_scales_return_the_source_byte_for_byte(name, dtype):
    cfg = CONFIGS[name]
    hf = random_hf(cfg)
    native = mj.from_hf(hf, cfg, dtype=dtype)
    assert not differences(mj.to_hf(native, cfg, quantization=True, scales=mj.source_scales(hf, cfg)), hf)


def test_source_scales_work_inside_jit_and_as_its_arguments():
    hf = random_hf(SMALL)
    native, scales = mj.from_hf(hf, SMALL), mj.source_scales(hf, SMALL)
    export = jax.jit(lambda tree, s: mj.to_hf(tree, SMALL, quantization=True, scales=s))
    assert not differences(export(native, scales), hf)
    assert not differences(jax.jit(lambda tree: export(tree, scales))(native), hf)


def test_source_scales_are_grouped_like_their_weights():
    hf = random_hf(RAGGED)
    scales = mj.source_scales(hf, RAGGED)
    experts = [MOE + f"experts.{expert}." for expert in range(3)]
    want = [np.concatenate([hf[e + "w1.weight" + SUFFIX].T, hf[e + "w3.weight" + SUFFIX].T], 1) for e in experts]
    assert np.array_equal(scales[GATE_UP + SUFFIX], np.stack(want))
    assert np.array_equal(scales[DOWN + SUFFIX], np.stack([hf[e + "w2.weight" + SUFFIX].T for e in experts]))
    assert scales[Q + SUFFIX] is hf[Q + SUFFIX]
    assert len(scales) == RAGGED.num_hidden_layers * 6
    assert mj.source_scales(random_hf(RAGGED, "BF16"), RAGGED) == {}


@DTYPES
def test_a_changed_weight_gets_new_scales_and_its_neighbours_keep_theirs(dtype):
    cfg = RAGGED if dtype is jnp.float32 else CONFIGS["a batch and a rest"]
    hf = random_hf(cfg)
    native = {key: np.array(leaf) for key, leaf in mj.from_hf(hf, cfg, dtype=dtype).items()}
    inter = cfg.intermediate_size
    native[GATE_UP][1, 3, inter + 5] += 1  # w3 of expert 1, row 5, column 3
    native[Q][0, 0] += 1
    back = mj.to_hf(native, cfg, quantization=True, scales=mj.source_scales(hf, cfg))
    want = dict(hf)
    for key, weight in ((W3, native[GATE_UP][1, :, inter:].T), (Q, native[Q])):
        want[key], want[key + SUFFIX] = helpers.quantize(weight, cfg.block)
    assert not differences(back, want)
    assert not np.array_equal(want[W3 + SUFFIX], hf[W3 + SUFFIX])


def test_a_weight_without_source_scales_is_scaled_by_amax():
    hf = random_hf(SMALL)
    scales = mj.source_scales(hf, SMALL)
    del scales[Q + SUFFIX]
    native = mj.from_hf(hf, SMALL)
    back = mj.to_hf(native, SMALL, quantization=True, scales=scales)
    codes, fresh = helpers.quantize(np.asarray(native[Q]), SMALL.block)
    assert not differences(back, hf | {Q: codes, Q + SUFFIX: fresh})


def test_source_scales_that_do_not_belong_are_refused():
    hf = random_hf(SMALL)
    native, scales = mj.from_hf(hf, SMALL), mj.source_scales(hf, SMALL)
    wrong = {
        GATE_UP + SUFFIX: scales[GATE_UP + SUFFIX][:, :, :-1],
        DOWN + SUFFIX: scales[DOWN + SUFFIX].astype(jnp.bfloat16),
        W1 + SUFFIX: hf[W1 + SUFFIX],
        "layers.0.mlp.experts.down_projs_scale_inv": scales[DOWN + SUFFIX],
    }
    with pytest.raises(LayoutError) as error:
        mj.to_hf(native, SMALL, quantization=True, scales=scales | wrong)
    assert keys_of(error) == set(wrong)


# --- BlockScaled ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cfg", CONFIGS.values(), ids=CONFIGS)
def test_fp8_native_trees_go_back_byte_for_byte(cfg):
    hf = random_hf(cfg)
    native = mj.from_hf(hf, cfg, dtype=None)
    assert {key for key, leaf in native.items() if isinstance(leaf, mj.BlockScaled)} == {
        key.removesuffix(SUFFIX) for key in mj.source_scales(hf, cfg)
    }
    assert not differences(mj.to_hf(native, cfg, quantization=True), hf)


def test_fp8_native_trees_pass_through_jit():
    hf = random_hf(RAGGED)
    there = jax.jit(lambda tree: mj.from_hf(tree, RAGGED, dtype=None))
    back = jax.jit(lambda tree: mj.to_hf(tree, RAGGED, quantization=True))
    assert not differences(back(there(hf)), hf)


def test_fp8_native_trees_mean_their_weights():
    hf = random_hf(RAGGED)
    native = mj.from_hf(hf, RAGGED, dtype=None)
    want = helpers.native_of(hf, RAGGED, BF16)
    for key, leaf in native.items():
        weights = leaf.dequantize(jnp.bfloat16) if isinstance(leaf, mj.BlockScaled) else leaf
        assert np.array_equal(bits(weights), bits(want[key]))
    hf_bf16 = mj.to_hf(native, RAGGED)
    assert not differences(hf_bf16, mj.to_hf(want, RAGGED))


def widest_float(hlo):
    """The most elements of any float tensor wider than a byte in a StableHLO text."""
    shapes = re.findall(r"tensor<((?:\d+x)*)(?:bf16|f16|f32|f64)>", hlo)
    return max(int(np.prod([int(size) for size in shape.split("x") if size])) for shape in shapes)


def test_fp8_native_trees_are_never_dequantised():
    tree = abstract(random_hf(RAGGED))
    there = jax.jit(lambda tree: mj.from_hf(tree, RAGGED, dtype=None))
    back = jax.jit(lambda tree: mj.to_hf(tree, RAGGED, quantization=True))
    weight = RAGGED.hidden_size * RAGGED.intermediate_size
    embedding = RAGGED.vocab_size * RAGGED.hidden_size
    assert widest_float(there.lower(tree).as_text()) == embedding < weight
    assert widest_float(back.lower(jax.eval_shape(there, tree)).as_text()) == embedding
    dequantised = jax.jit(lambda tree: mj.from_hf(tree, RAGGED)).lower(tree).as_text()
    assert widest_float(dequantised) >= 3 * 2 * weight  # the measure does see a dequantised tensor


def test_stored_codes_beside_their_scales_are_as_good_as_block_scaled():
    hf = random_hf(SMALL)
    native = mj.from_hf(hf, SMALL, dtype=None)
    stored = {}
    for key, leaf in native.items():
        scaled = isinstance(leaf, mj.BlockScaled)
        stored |= {key: leaf.values, key + SUFFIX: leaf.scale_inv} if scaled else {key: leaf}
    assert not differences(mj.to_hf(stored, SMALL, quantization=True), hf)
    assert not differences(mj.to_hf(stored, SMALL), mj.to_hf(native, SMALL))


def test_block_scaled_of_other_blocks_is_refused():
    cfg = helpers.config(hidden_size=128, intermediate_size=128)  # a grid of one block, whatever its sides
    native = mj.from_hf(random_hf(cfg), cfg, dtype=None)
    leaf = native[DOWN]
    native[DOWN] = mj.BlockScaled(values=leaf.values, scale_inv=leaf.scale_inv, block=(256, 256))
    with pytest.raises(LayoutError, match="wrong blocks") as error:
        mj.to_hf(native, cfg, quantization=True)
    assert keys_of(error) == {DOWN}


def test_scales_given_twice_are_refused():
    native = mj.from_hf(random_hf(SMALL), SMALL, dtype=None)
    for tree in ({GATE_UP + SUFFIX: native[GATE_UP].scale_inv, **native}, native | {Q + SUFFIX: native[Q].scale_inv}):
        with pytest.raises(LayoutError, match="given twice"):
            mj.to_hf(tree, SMALL)
