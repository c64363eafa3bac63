import concurrent.futures

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conversion_cases import CONFIGS, DOWN, DTYPES, GATE_UP, MOE, RAGGED, SMALL, abstract, keys_of, on_device
from helpers import BF16, F32, FP8, SUFFIX, bits, differences, random_hf, without_prefix
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import minimax_jax as mj
from minimax_jax.errors import LayoutError

# --- from_hf ----------------------------------------------------------------------------------------------------------


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


# --- sharding ---------------------------------------------------------------------------------------------------------


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


# --- purity, donation, threads ----------------------------------------------------------------------------------------


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


# --- one tensor -------------------------------------------------------------------------------------------------------


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


# --- lowering ---------------------------------------------------------------------------------------------------------

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
