import concurrent.futures
import re

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import BF16, F32, FP8, SUFFIX, bits, differences, random_hf, without_prefix
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import minimax_jax as mj
from minimax_jax.errors import LayoutError, NumericError
from minimax_jax.ops.assemble import EXPERTS_AT_ONCE

RAGGED = helpers.config()
SMALL = helpers.config(
    hidden_size=40,
    intermediate_size=24,
    weight_block_size=(16, 8),
    num_hidden_layers=1,
    num_attention_heads=1,
    head_dim=40,
)
CONFIGS = {
    "ragged": RAGGED,
    "one expert": helpers.config(num_local_experts=1, hidden_size=256, intermediate_size=128, num_hidden_layers=1),
    "a batch and a rest": SMALL.replace(num_local_experts=EXPERTS_AT_ONCE + 5),
    "two batches": SMALL.replace(num_local_experts=2 * EXPERTS_AT_ONCE),
}
MLP = "model.layers.0.mlp.experts."
MOE = "model.layers.0.block_sparse_moe."
GATE_UP, DOWN = MLP + "gate_and_up_projs", MLP + "down_projs"
W1, W2, W3 = (MOE + f"experts.1.{name}.weight" for name in ("w1", "w2", "w3"))
Q = "model.layers.0.self_attn.q_proj.weight"
DTYPES = pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])


def on_device(tree):
    return {key: jnp.array(array) for key, array in tree.items()}


def abstract(tree):
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), tree)


def keys_of(error):
    return {problem.key for problem in error.value.problems}


# --- from_hf --------------------------------------------------------------------------------------------------------


@DTYPES
@pytest.mark.parametrize("source", ["F8_E4M3", "BF16", "F32"])
@pytest.mark.parametrize("cfg", CONFIGS.values(), ids=CONFIGS)
def test_from_hf_is_what_numpy_makes(cfg, source, dtype):
    hf = random_hf(cfg, source)
    assert not differences(mj.from_hf(hf, cfg, dtype=dtype), helpers.native_of(hf, cfg, dtype))


@pytest.mark.parametrize("source", ["F8_E4M3", "BF16", "F32"])
@pytest.mark.parametrize("cfg", [RAGGED, CONFIGS["a batch and a rest"]], ids=["ragged", "many experts"])
def test_from_hf_under_jit_has_the_same_bits(cfg, source):
    hf = random_hf(cfg, source)
    native = jax.jit(lambda tree: mj.from_hf(tree, cfg))(hf)
    assert not differences(native, helpers.native_of(hf, cfg, BF16))


def test_special_values_of_unquantised_weights_survive():
    hf = random_hf(SMALL, "BF16")
    special = np.array([0x0000, 0x8000, 0x0001, 0x807F, 0x7F80, 0xFF80, 0x7F7F, 0x7FC0], np.uint16).view(BF16)
    hf[MOE + "experts.1.w3.weight"][0, :8] = special
    for dtype in (jnp.bfloat16, jnp.float32):
        native = mj.from_hf(hf, SMALL, dtype=dtype)
        assert not differences(native, helpers.native_of(hf, SMALL, dtype))
    assert not differences(mj.to_hf(mj.from_hf(hf, SMALL), SMALL), hf)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, None])
def test_router_norms_and_embeddings_are_the_callers_own(dtype):
    hf = random_hf(SMALL)
    native = mj.from_hf(hf, SMALL, dtype=dtype)
    assert native["model.layers.0.mlp.gate.weight"] is hf[MOE + "gate.weight"]
    assert native["model.layers.0.mlp.gate.e_score_correction_bias"] is hf[MOE + "e_score_correction_bias"]
    assert native["model.norm.weight"] is hf["model.norm.weight"]
    back = mj.to_hf(native, SMALL, quantization=True)
    assert back[MOE + "gate.weight"] is hf[MOE + "gate.weight"]
    assert hf[MOE + "gate.weight"].dtype == F32


def test_eval_shape_gives_every_shape_and_dtype_without_computing():
    hf = random_hf(RAGGED)
    native = jax.eval_shape(lambda tree: mj.from_hf(tree, RAGGED), abstract(hf))
    want = helpers.native_of(hf, RAGGED, BF16)
    assert {k: (v.shape, v.dtype) for k, v in native.items()} == {k: (v.shape, v.dtype) for k, v in want.items()}
    for quantization, form in ((False, "BF16"), (True, "F8_E4M3")):
        back = jax.eval_shape(lambda tree, q=quantization: mj.to_hf(tree, RAGGED, quantization=q), native)
        want = random_hf(RAGGED, form)
        assert {k: (v.shape, v.dtype) for k, v in back.items()} == {k: (v.shape, v.dtype) for k, v in want.items()}


def test_the_prefix_may_be_absent():
    hf = random_hf(SMALL)
    bare = without_prefix(hf)
    native = mj.from_hf(bare, SMALL)
    assert not differences(native, without_prefix(helpers.native_of(hf, SMALL, BF16)))
    scales = mj.source_scales(bare, SMALL)
    assert not differences(mj.to_hf(native, SMALL, quantization=True, scales=scales), bare)


def test_weights_become_no_dtype_that_is_not_one_of_weights():
    for dtype in (jnp.float8_e4m3fn, np.float64, np.int8):
        with pytest.raises(LayoutError, match="unsupported dtype of weights"):
            mj.from_hf(random_hf(SMALL, "BF16"), SMALL, dtype=dtype)


# --- sharding -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("devices", [4, 8])
def test_out_shardings_split_the_experts(devices):
    cfg = SMALL.replace(num_local_experts=8)
    hf = random_hf(cfg)
    mesh = jax.make_mesh((devices,), ("ep",), axis_types=(AxisType.Auto,), devices=jax.devices()[:devices])
    placed = {
        key: NamedSharding(mesh, PartitionSpec("ep") if key in (GATE_UP, DOWN) else PartitionSpec())
        for key in helpers.native_of(hf, cfg, BF16)
    }
    native = jax.jit(lambda tree: mj.from_hf(tree, cfg), out_shardings=placed)(hf)
    assert {key: leaf.sharding for key, leaf in native.items()} == placed
    shards = native[GATE_UP].addressable_shards
    assert {shard.device for shard in shards} == set(mesh.devices.flat)
    assert {shard.data.shape for shard in shards} == {(8 // devices, cfg.hidden_size, 2 * cfg.intermediate_size)}
    assert not differences(native, helpers.native_of(hf, cfg, BF16))
    assert not differences(mj.to_hf(native, cfg), mj.to_hf(helpers.native_of(hf, cfg, BF16), cfg))


def test_spread_experts_keep_their_negative_zeros():
    cfg = SMALL.replace(num_local_experts=4)
    mesh = jax.make_mesh((4,), ("ep",), axis_types=(AxisType.Auto,), devices=jax.devices()[:4])
    zeros = jnp.full((4, cfg.hidden_size, 2 * cfg.intermediate_size), -0.0, jnp.bfloat16)
    native = {GATE_UP: jax.device_put(zeros, NamedSharding(mesh, PartitionSpec("ep")))}
    for back in (mj.to_hf, jax.jit(mj.to_hf, static_argnums=1, static_argnames=("partial", "quantization"))):
        for quantization, negative in ((False, 0x8000), (True, 0x80)):
            hf = back(native, cfg, partial=True, quantization=quantization)
            weights = [bits(array) for key, array in hf.items() if not key.endswith(SUFFIX)]
            assert len(weights) == 8
            assert all((weight == negative).all() for weight in weights)


# --- purity, donation, threads --------------------------------------------------------------------------------------


def test_inputs_are_left_alone():
    hf = random_hf(SMALL)
    for array in hf.values():
        array.setflags(write=False)
    before = dict(hf), {key: bits(array).copy() for key, array in hf.items()}
    native = mj.from_hf(hf, SMALL)
    kept = dict(native)
    mj.to_hf(native, SMALL, quantization=True, scales=mj.source_scales(hf, SMALL))
    assert list(hf) == list(before[0])
    assert all(hf[key] is array for key, array in before[0].items())
    assert all(np.array_equal(bits(hf[key]), old) for key, old in before[1].items())
    assert all(native[key] is leaf for key, leaf in kept.items())


def test_jax_inputs_are_not_deleted_unless_donated():
    hf = on_device(random_hf(SMALL))
    native = mj.from_hf(hf, SMALL, dtype=None)
    mj.to_hf(native, SMALL)
    assert not any(array.is_deleted() for array in jax.tree.leaves((hf, native)))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, None])
def test_donate_deletes_what_was_used_and_nothing_that_is_handed_on(dtype):
    source = random_hf(SMALL)
    hf = on_device(source)
    native = mj.from_hf(hf, SMALL, dtype=dtype, donate=True)
    used = (".experts.",) if dtype is None else (".experts.", "_proj.")
    assert {key for key, array in hf.items() if array.is_deleted()} == {
        key for key in hf if any(part in key for part in used)
    }
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(native))
    back = mj.to_hf(native, SMALL, quantization=True, scales=mj.source_scales(source, SMALL), donate=True)
    assert native[GATE_UP].values.is_deleted() if dtype is None else native[GATE_UP].is_deleted()
    assert not differences(back, source)


def test_donate_leaves_numpy_arrays_alone_and_goes_through_a_trace():
    hf = random_hf(SMALL)
    native = jax.jit(lambda tree: mj.from_hf(tree, SMALL, donate=True))(hf)
    assert not differences(mj.from_hf(hf, SMALL, donate=True), native)


def test_threads_share_inputs():
    hf = random_hf(SMALL)
    scales = mj.source_scales(hf, SMALL)

    def there_and_back(_):
        native = mj.from_hf(hf, SMALL)
        return differences(mj.to_hf(native, SMALL, quantization=True, scales=scales), hf)

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        assert list(pool.map(there_and_back, range(24))) == [[]] * 24


# --- to_hf ----------------------------------------------------------------------------------------------------------


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


# --- BlockScaled ----------------------------------------------------------------------------------------------------


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


# --- what cannot be converted ---------------------------------------------------------------------------------------


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
    assert lost.removesuffix(SUFFIX) in keys_of(error) | {key.removesuffix(SUFFIX) for key in keys_of(error)}


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


# --- one tensor -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("quantization", [False, True])
def test_single_tensors_make_up_the_whole_tree(quantization):
    hf = random_hf(SMALL)
    for dtype in (jnp.bfloat16, None):
        native = mj.from_hf(hf, SMALL, dtype=dtype)
        pairs = [
            pair
            for fqn, leaf in native.items()
            for pair in mj.convert_single_tensor_to_hf(fqn, leaf, SMALL, quantization=quantization)
        ]
        whole = mj.to_hf(native, SMALL, quantization=quantization)
        assert [key for key, _ in pairs] == list(whole)
        assert not differences(dict(pairs), whole)


def test_a_single_tensor_keeps_its_source_scales_and_its_own_prefix():
    hf = random_hf(SMALL)
    native, scales = mj.from_hf(hf, SMALL), mj.source_scales(hf, SMALL)
    bare = GATE_UP.removeprefix("model.")
    for fqn, want in ((GATE_UP, hf), (bare, without_prefix(hf))):
        pairs = mj.convert_single_tensor_to_hf(
            fqn, native[GATE_UP], SMALL, quantization=True, source=scales[GATE_UP + SUFFIX]
        )
        assert not differences(dict(pairs), {key: want[key] for key in want if ".w1." in key or ".w3." in key})


def test_names_that_are_not_native_are_refused():
    weight = np.zeros((3, 40, 48), BF16)
    for fqn in ("model.layers.7.mlp.experts.gate_and_up_projs", GATE_UP + "x", GATE_UP + SUFFIX):
        with pytest.raises(LayoutError) as error:
            mj.convert_single_tensor_to_hf(fqn, weight, SMALL)
        assert fqn in keys_of(error)
    with pytest.raises(LayoutError, match="wrong shape"):
        mj.convert_single_tensor_to_hf(GATE_UP, weight[:2], SMALL)


# --- lowering -------------------------------------------------------------------------------------------------------

PLATFORMS = ["cpu", "cuda", "rocm", "tpu"]


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32, None])
def test_every_conversion_lowers_for_every_platform(dtype):
    hf = abstract(random_hf(SMALL))
    there = jax.jit(lambda tree: mj.from_hf(tree, SMALL, dtype=dtype))
    assert jax.export.export(there, platforms=PLATFORMS)(hf).platforms == tuple(PLATFORMS)
    native = jax.eval_shape(there, hf)
    scales = jax.eval_shape(lambda tree: mj.source_scales(tree, SMALL), hf)
    for back in (
        jax.jit(lambda tree, _: mj.to_hf(tree, SMALL)),
        jax.jit(lambda tree, _: mj.to_hf(tree, SMALL, quantization=True)),
        jax.jit(lambda tree, s: mj.to_hf(tree, SMALL, quantization=True, scales=s)),
    ):
        assert jax.export.export(back, platforms=PLATFORMS)(native, scales).platforms == tuple(PLATFORMS)


def test_a_published_layer_of_more_than_2_31_elements_lowers():
    cfg = helpers.config(
        hidden_size=3072, intermediate_size=1536, num_local_experts=256, num_hidden_layers=1, num_experts_per_tok=8
    )
    weight = jax.ShapeDtypeStruct((1536, 3072), FP8), jax.ShapeDtypeStruct((12, 24), F32)
    hf = {}
    for expert in range(256):
        for name in ("w1", "w3"):
            key = MOE + f"experts.{expert}.{name}.weight"
            hf[key], hf[key + SUFFIX] = weight
    lowered = jax.jit(lambda tree: mj.from_hf(tree, cfg, partial=True)).lower(hf)
    assert lowered.out_info[GATE_UP].shape == (256, 3072, 3072)
    assert lowered.out_info[GATE_UP].size > 2**31
    back = jax.jit(lambda tree: mj.to_hf(tree, cfg, partial=True, quantization=True))
    assert len(back.lower({GATE_UP: jax.ShapeDtypeStruct((256, 3072, 3072), BF16)}).out_info) == 4 * 256
