"""The kernels for TPUs, interpreted on a CPU and held against numpy; and which programs have them."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fp8_cases import ALL_CODES, BF16, E4M3, FINITE, TINY, assert_same_bits, oracle_codes, oracle_dequantize, spread
from helpers import bits
from jax import export
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from minimax_jax.errors import LayoutError, NumericError
from minimax_jax.ops import kernels_tpu, on_tpu
from minimax_jax.ops.assemble import split
from minimax_jax.ops.backend import TPU_VARIABLE, tpu_kernels
from minimax_jax.ops.fp8 import FP8
from minimax_jax.ops.grouped import put_grouped, quantize_grouped
from minimax_jax.ops.scaled import BlockScaled, dequantize_grouped

BLOCK = (128, 128)
MEMORY = pltpu.InterpretParams()
"""Interpret with the memories of a TPU and the copies between them: what is not written is NaN."""
WAYS = pytest.mark.parametrize(("parts", "interpret"), [(2, MEMORY), (1, True)], ids=["memory", "plain"])
ODD = [np.nan, np.inf, -np.inf, 0.0, -0.0, TINY / 2, -TINY / 4, TINY, -TINY, 3.4e38]
"""Scales that are no normal numbers, and the ends of those that are."""


@pytest.fixture
def small_tiles(monkeypatch):
    """Several steps along every axis of the grid, and loops of one, two and four blocks."""
    monkeypatch.setattr(kernels_tpu, "_TILE", (256, 128))


def grids(rng, parts, *shape):
    return [(np.exp2(rng.uniform(-12, 2, shape)) * rng.choice([-1, 1], shape)).astype(np.float32) for _ in range(parts)]


def coded(rng, parts, experts, rows, cols, among=ALL_CODES):
    codes = [rng.choice(among, (experts, rows, cols)).astype(np.uint8).view(E4M3) for _ in range(parts)]
    return codes, grids(rng, parts, experts, rows // 128, cols // 128)


def expected_weights(codes, scales):
    pairs = zip(codes, scales, strict=True)
    return np.concatenate([oracle_dequantize(c, s, BF16, BLOCK) for c, s in pairs], axis=1).swapaxes(1, 2)


def apart(grouped, parts):
    return [np.ascontiguousarray(part.swapaxes(1, 2)) for part in np.split(grouped, parts, axis=2)]


def expected_scales(x):
    experts, rows, cols = x.shape
    blocks = np.abs(x.astype(np.float32)).reshape(experts, rows // 128, 128, cols // 128, 128)
    scale = blocks.max((2, 4)) / np.float32(448)
    return np.where(scale < TINY, np.float32(1), scale)


# ---- dequantise and group


@WAYS
def test_weights_are_those_of_numpy(parts, interpret, small_tiles):
    codes, scales = coded(np.random.default_rng(parts), parts, 2, 512, 256)
    assert np.unique(codes[0].view(np.uint8)).size == 256
    (made,) = kernels_tpu.dequantize_grouped(*codes, *scales, parts=parts, interpret=interpret)
    assert_same_bits(made, expected_weights(codes, scales))


def test_weights_of_odd_scales_are_those_of_the_formulas():
    codes = [ALL_CODES.repeat(64).reshape(1, 128, 128).repeat(len(ODD), 0).view(E4M3)]
    scales = [np.float32(ODD).reshape(-1, 1, 1)]
    (made,) = kernels_tpu.dequantize_grouped(*codes, *scales, parts=1, interpret=True)
    formulas = dequantize_grouped([BlockScaled(values=codes[0], scale_inv=scales[0])])
    assert_same_bits(made, formulas)


def test_experts_are_put_where_they_belong(small_tiles):
    codes, scales = coded(np.random.default_rng(5), 2, 2, 256, 384, FINITE)
    before = np.random.default_rng(6).integers(0, 2**16, (7, 384, 512)).astype(np.uint16)
    at = np.int32([3])
    (made,) = kernels_tpu.dequantize_into(before, at, *codes, *scales, parts=2, interpret=MEMORY)
    wanted = before.copy()
    wanted[3:5] = bits(expected_weights(codes, scales))
    np.testing.assert_array_equal(made, wanted)


# ---- ungroup and quantise


def all_weights(*shape):
    """Every finite bfloat16 that is no denormal, in a random order."""
    every = np.arange(2**16, dtype=np.uint16).view(BF16)
    size = np.abs(every.astype(np.float32))
    every = every[np.isfinite(size) & ((size == 0) | (size >= TINY))]
    return np.random.default_rng(0).permutation(np.resize(every, np.prod(shape))).reshape(shape)


@WAYS
def test_codes_by_amax_are_those_of_numpy(parts, interpret, small_tiles):
    rng = np.random.default_rng(parts)
    weights = (rng.standard_normal((2, 256, 512 * parts)) * np.exp2(rng.integers(-9, 9, (2, 256, 1)))).astype(BF16)
    weights[0, :128, :128] = 0
    weights[0, 0, :3] = -0.0
    made = kernels_tpu.quantize_grouped(weights, parts=parts, interpret=interpret)
    for part, codes, scales in zip(apart(weights, parts), made[:parts], made[parts:], strict=True):
        np.testing.assert_array_equal(bits(scales), bits(expected_scales(part)))
        wanted = oracle_codes(part, spread(expected_scales(part), part.shape, BLOCK))
        np.testing.assert_array_equal(bits(codes), bits(wanted))


def test_codes_by_given_scales_are_those_of_numpy_for_every_weight():
    weights = all_weights(1, 256, 512)
    scales = grids(np.random.default_rng(3), 2, 1, 2, 2)
    grid = np.concatenate(scales, axis=1).swapaxes(1, 2)
    made = kernels_tpu.quantize_grouped(weights, grid, parts=2, interpret=MEMORY)
    for part, codes, scale in zip(apart(weights, 2), made, scales, strict=True):
        full = spread(scale, part.shape, BLOCK)
        np.testing.assert_array_equal(bits(codes), bits(oracle_codes(part, full)))


def test_ties_go_to_the_even_code():
    values = np.sort(FINITE[FINITE < 0x80].view(E4M3).astype(np.float32))
    halfway = (values[:-1] + values[1:]) / 2
    ties = np.resize(np.concatenate([halfway, -halfway]), (1, 128, 128)).astype(BF16)
    assert np.array_equal(np.unique(np.abs(ties.astype(np.float32))), halfway)
    for scale in (1.0, -1.0, 2.0**-9):
        grid = np.full((1, 1, 1), scale, np.float32)
        weights = (ties.astype(np.float32) * np.float32(scale)).astype(BF16)
        (codes,) = kernels_tpu.quantize_grouped(weights, grid, parts=1, interpret=True)
        np.testing.assert_array_equal(bits(codes), bits(oracle_codes(ties.swapaxes(1, 2), np.float32(1))))


def test_what_has_no_code_is_nan_as_by_the_formulas():
    weights = all_weights(len(ODD), 128, 128)
    weights[:, 5, 7], weights[:, 6, 8], weights[:, 9, 9] = np.nan, np.inf, -np.inf
    scales = np.float32(ODD).reshape(-1, 1, 1)
    (codes,) = kernels_tpu.quantize_grouped(weights, scales, parts=1, interpret=True)
    formulas = jax.jit(lambda x, s: quantize_grouped(x, 1, s)[0].values)(weights, scales)
    np.testing.assert_array_equal(bits(codes), bits(formulas))
    assert np.isnan(np.asarray(codes)[:, 7, 5].astype(np.float32)).all()
    codes, derived = kernels_tpu.quantize_grouped(weights, parts=1, interpret=True)
    assert np.isnan(derived).all()
    assert set(np.unique(bits(codes) & 0x7F)) <= {0, 0x7F}


# ---- what a kernel reads and writes


@pytest.mark.parametrize("parts", [1, 2])
def test_each_block_is_read_or_written_once(parts, small_tiles):
    layout = kernels_tpu.Layout(experts=2, parts=parts, rows=768, cols=384)
    shapes = {"codes": layout.codes(), "scales": layout.scales(), "grouped": [layout.grouped()]}
    itemsize, total = {"codes": 1, "scales": 4, "grouped": 2}, 0
    for what, specs in shapes.items():
        for spec in specs:
            places = [tuple(map(int, spec.index_map(*step))) for step in itertools.product(*map(range, layout.grid))]
            visits = [place for place, _ in itertools.groupby(places)]
            steps = [size // block for size, block in zip(layout.shape(what), spec.block_shape, strict=True)]
            assert sorted(visits) == list(itertools.product(*map(range, steps)))
            total += len(visits) * np.prod(spec.block_shape) * itemsize[what]
    assert layout.cost().bytes_accessed == total


# ---- which programs have them


def experts(experts=4, rows=256, cols=384, parts=2, **fields):
    rng = np.random.default_rng(1)
    codes, scales = coded(rng, parts, experts, rows, cols, FINITE)
    return [
        BlockScaled(values=jnp.asarray(c), scale_inv=jnp.asarray(s), **fields)
        for c, s in zip(codes, scales, strict=True)
    ]


def weights(dtype=jnp.bfloat16, shape=(4, 384, 512)):
    return jnp.asarray(np.random.default_rng(2).standard_normal(shape), dtype)


def put(shard, parts, layer, expert):
    return put_grouped(shard, parts, (layer, expert), jnp.bfloat16)


CASES = {
    "dequantise": (dequantize_grouped, (experts(),)),
    "quantise": (lambda x: quantize_grouped(x, 2), (weights(),)),
    "quantise by scales": (lambda x, s: quantize_grouped(x, 2, s), (weights(), jnp.ones((4, 3, 4)))),
    "split": (lambda x: split(x, 2, FP8, block=BLOCK), (weights(),)),
    "put": (put, (jnp.zeros((3, 8, 384, 512), jnp.uint16), experts(), jnp.int32(1), jnp.int32(2))),
}
LEFT = {
    "float32 made": (lambda parts: dequantize_grouped(parts, jnp.float32), (experts(),)),
    "float32 quantised": (lambda x: quantize_grouped(x, 2), (weights(jnp.float32),)),
    "ragged": (lambda x: quantize_grouped(x, 2), (weights(shape=(4, 384, 320)),)),
    "other blocks": (lambda x: quantize_grouped(x, 2, block=(64, 128)), (weights(),)),
}


def module(function, arguments, *platforms):
    return export.export(jax.jit(function), platforms=platforms)(*arguments).mlir_module()


@pytest.mark.parametrize("name", CASES)
def test_programs_for_tpus_have_them_and_no_others(name, monkeypatch):
    assert "tpu_custom_call" in module(*CASES[name], "tpu")
    assert "tpu_custom_call" in module(*CASES[name], "cpu", "cuda", "rocm", "tpu")
    assert "tpu_custom_call" not in module(*CASES[name], "cpu", "cuda", "rocm")
    monkeypatch.setenv(TPU_VARIABLE, "xla")
    jax.clear_caches()
    assert "tpu_custom_call" not in module(*CASES[name], "tpu")


@pytest.mark.parametrize("name", LEFT)
def test_what_they_do_not_cover_is_left_to_xla(name):
    assert "tpu_custom_call" not in module(*LEFT[name], "tpu")


def test_scales_that_a_chip_has_no_room_for_are_left_to_xla():
    assert on_tpu.covers((256, 1536, 3072), BLOCK, 2)
    assert not on_tpu.covers((1, 2**17, 2**17), BLOCK, 1)
    assert not on_tpu.covers((0, 128, 128), BLOCK, 1)


def test_a_program_that_xla_divides_keeps_the_formulas_and_one_of_each_device_does_not():
    mesh = jax.make_mesh((4,), ("expert",), axis_types=(AxisType.Auto,))
    share = NamedSharding(mesh, PartitionSpec("expert"))
    parts = jax.device_put(experts(), share)
    assert "tpu_custom_call" not in module(dequantize_grouped, (parts,), "tpu")
    each = jax.shard_map(
        dequantize_grouped, mesh=mesh, in_specs=PartitionSpec("expert"), out_specs=PartitionSpec("expert")
    )
    assert "tpu_custom_call" in module(each, (parts,), "tpu")
    np.testing.assert_array_equal(bits(jax.jit(each)(parts)), bits(dequantize_grouped(experts())))


def test_what_the_variable_may_say(monkeypatch):
    assert tpu_kernels() == "pallas"
    monkeypatch.setenv(TPU_VARIABLE, "xla")
    assert tpu_kernels() == "xla"
    monkeypatch.setenv(TPU_VARIABLE, "numba")
    with pytest.raises(LayoutError, match="MINIMAX_JAX_TPU"):
        tpu_kernels()


# ---- the functions around them


def test_quantised_parts_are_those_of_numpy():
    x = np.asarray(weights())
    for call in (lambda f: f, jax.jit):
        made = call(lambda x: quantize_grouped(x, 2))(x)
        for own, part in zip(made, apart(x, 2), strict=True):
            np.testing.assert_array_equal(bits(own.scale_inv), bits(expected_scales(part)))
            wanted = oracle_codes(part, spread(expected_scales(part), part.shape, BLOCK))
            np.testing.assert_array_equal(bits(own.values), bits(wanted))


def test_quantising_refuses_what_has_no_code():
    x = np.asarray(weights()).copy()
    with pytest.raises(LayoutError):
        quantize_grouped(x, 5)
    with pytest.raises(LayoutError):
        quantize_grouped(x, 2, jnp.ones((4, 3, 2)))
    with pytest.raises(NumericError, match="scales"):
        quantize_grouped(x, 2, jnp.zeros((4, 3, 4)))
    x[1, 2, 3] = np.nan
    for scales in (None, jnp.ones((4, 3, 4))):
        with pytest.raises(NumericError, match=r"\[1, 2, 3\]"):
            quantize_grouped(x, 2, scales)


def test_derivatives_and_batches_are_those_of_the_formulas():
    (part,) = experts(experts=2, rows=128, cols=128, parts=1)
    values = jnp.stack([part.values, part.values[::-1]])

    def total(scales):
        weights = dequantize_grouped([BlockScaled(values=part.values, scale_inv=scales)])
        return weights.astype(jnp.float32).sum()

    slope = jax.jit(jax.grad(total))(part.scale_inv)
    wanted = np.asarray(part.values).astype(np.float32).astype(BF16).astype(np.float64).sum((1, 2), keepdims=True)
    np.testing.assert_allclose(slope, wanted, rtol=1e-2, atol=64)
    one = lambda values: dequantize_grouped([BlockScaled(values=values, scale_inv=part.scale_inv)])  # noqa: E731
    np.testing.assert_array_equal(bits(jax.vmap(one)(values)), bits(jnp.stack([one(own) for own in values])))
