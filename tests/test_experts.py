"""Grouping and stacking of experts, against plain numpy."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from helpers import bits
from scaled_cases import random_scaled

import minimax_jax as mj
from minimax_jax import synthetic
from minimax_jax.errors import LayoutError
from minimax_jax.ops.experts import group, stack, ungroup
from minimax_jax.ops.scaled import dequantize_grouped, group_scaled, ungroup_scaled

E4M3 = ml_dtypes.float8_e4m3fn
DTYPES = (np.float32, ml_dtypes.bfloat16, np.float16, E4M3, np.uint8)


def random_array(rng, shape, dtype):
    return rng.integers(0, 256, (*shape, np.dtype(dtype).itemsize), np.uint8).view(dtype)[..., 0]


def numpy_group(parts):
    """Expert by expert, as the layout says: [cols, rows of part 0 then rows of part 1...]."""
    return np.stack([np.hstack([np.asarray(part[e]).T for part in parts]) for e in range(parts[0].shape[0])])


# --- group and ungroup


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", [1, 2, 3])
def test_group_equals_numpy_and_ungroup_undoes_it(dtype, count):
    rng = np.random.default_rng(0)
    parts = [random_array(rng, (4, 6, 10), dtype) for _ in range(count)]
    grouped = jax.jit(group)([jnp.asarray(part) for part in parts])
    assert grouped.dtype == dtype
    np.testing.assert_array_equal(bits(grouped), bits(numpy_group(parts)))
    back = ungroup(grouped, count)
    assert len(back) == count
    for part, again in zip(parts, back, strict=True):
        assert again.dtype == dtype
        np.testing.assert_array_equal(bits(again), bits(part))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_group_has_a_derivative(dtype):
    parts = [jnp.ones((2, 3, 4), dtype)] * 2
    weight = jnp.arange(48, dtype=dtype).reshape(2, 4, 6)
    slopes = jax.jit(jax.grad(lambda parts: (group(parts) * weight).sum()))(parts)
    for slope, expected in zip(slopes, ungroup(weight, 2), strict=True):
        np.testing.assert_array_equal(slope, expected)


def test_group_takes_parts_of_different_rows():
    parts = [jnp.arange(24).reshape(2, 3, 4), -jnp.arange(40).reshape(2, 5, 4)]
    np.testing.assert_array_equal(group(parts), numpy_group(parts))


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ([], "nothing"),
        ([(3, 4)], "not the matrices"),
        ([(2, 3, 4), (2, 3, 5)], "side by side"),
        ([(1, 2, 2), (2, 2, 2)], "side"),
    ],
)
def test_parts_that_do_not_group_are_refused(shapes, message):
    with pytest.raises(LayoutError, match=message):
        group([jnp.zeros(shape) for shape in shapes])


def test_parts_of_two_dtypes_are_refused():
    with pytest.raises(LayoutError, match="dtype"):
        group([jnp.zeros((1, 2, 2)), jnp.zeros((1, 2, 2), jnp.bfloat16)])


@pytest.mark.parametrize(("shape", "parts"), [((2, 3, 5), 2), ((2, 3), 1), ((2, 3, 4), 0)])
def test_what_is_not_grouped_is_not_ungrouped(shape, parts):
    with pytest.raises(LayoutError, match="not a grouped tensor"):
        ungroup(jnp.zeros(shape), parts)


# --- grouped FP8


SHAPES = pytest.mark.parametrize("shape", [(3, 32, 24), (3, 40, 24), (2, 24, 20), (1, 5, 3)])


@SHAPES
@pytest.mark.parametrize("count", [1, 2])
def test_group_scaled_carries_every_scale_along_and_comes_back_byte_for_byte(shape, count):
    rng = np.random.default_rng(1)
    parts = [random_scaled(rng, shape) for _ in range(count)]
    grouped = jax.jit(group_scaled)(parts)
    assert (grouped.block, grouped.parts) == ((8, 16), count)
    assert grouped.shape == (shape[0], shape[2], count * shape[1])
    np.testing.assert_array_equal(bits(grouped.values), bits(numpy_group([part.values for part in parts])))
    expected = numpy_group([part.dequantize(jnp.float32) for part in parts])
    np.testing.assert_array_equal(bits(grouped.dequantize(jnp.float32)), bits(expected))
    for part, again in zip(parts, ungroup_scaled(grouped), strict=True):
        np.testing.assert_array_equal(bits(again.values), bits(part.values))
        np.testing.assert_array_equal(bits(again.scale_inv), bits(part.scale_inv))
        assert (again.block, again.parts) == (part.block, 1)


@SHAPES
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32, jnp.float16])
def test_dequantize_grouped_equals_dequantize_then_group(shape, dtype):
    rng = np.random.default_rng(2)
    parts = [random_scaled(rng, shape), random_scaled(rng, shape)]
    expected = numpy_group([part.dequantize(dtype) for part in parts])
    for call in (dequantize_grouped, jax.jit(dequantize_grouped, static_argnums=1)):
        got = call(parts, dtype)
        assert got.dtype == dtype
        np.testing.assert_array_equal(bits(got), bits(expected))


def test_real_block_size_grouped_scales_have_the_transposed_grid():
    rng = np.random.default_rng(3)
    parts = [random_scaled(rng, (2, 256, 384), block=(128, 128)) for _ in range(2)]
    assert group_scaled(parts).scale_inv.shape == (2, 3, 4)


@pytest.mark.parametrize(
    ("shapes", "blocks", "message"),
    [
        ([], [], "nothing"),
        ([(2, 16, 8), (2, 32, 8)], [(16, 8)] * 2, "side by side"),
        ([(2, 16, 8), (2, 16, 8)], [(16, 8), (8, 8)], "side by side"),
        ([(16, 8)], [(16, 8)], "not the matrices"),
    ],
)
def test_scaled_parts_that_do_not_group_are_refused(shapes, blocks, message):
    rng = np.random.default_rng(4)
    parts = [random_scaled(rng, shape, block) for shape, block in zip(shapes, blocks, strict=True)]
    for call in (group_scaled, dequantize_grouped):
        with pytest.raises(LayoutError, match=message):
            call(parts)


def test_what_is_grouped_is_not_grouped_again():
    grouped = group_scaled([random_scaled(np.random.default_rng(5), (1, 16, 8))] * 2)
    with pytest.raises(LayoutError, match="parts=1"):
        group_scaled([grouped])


# --- BlockScaled


@pytest.mark.parametrize("traced", [False, True])
def test_stacking_keeps_the_payload_of_every_nan(traced):
    rng = np.random.default_rng(0)
    arrays = [rng.integers(0, 2**16, (64, 96), np.uint16).view(ml_dtypes.bfloat16) for _ in range(5)]
    done = (jax.jit(stack) if traced else stack)(arrays)
    np.testing.assert_array_equal(np.asarray(done).view(np.uint16), np.stack([a.view(np.uint16) for a in arrays]))


def test_stacking_has_a_derivative():
    arrays = [jnp.arange(3, dtype=jnp.bfloat16), jnp.ones(3, jnp.bfloat16)]
    gradients = jax.grad(lambda arrays: (stack(arrays) * jnp.array([[2], [3]], jnp.bfloat16)).sum())(arrays)
    assert [g.tolist() for g in gradients] == [[2, 2, 2], [3, 3, 3]]


def test_bf16_of_any_bits_goes_to_native_and_back(tmp_path):
    config = synthetic.config(layers=1, experts=3)
    synthetic.synthesize(tmp_path / "hf", config, scaled="BF16")
    file = next((tmp_path / "hf").glob("*.safetensors"))
    data = np.fromfile(file, np.uint8)
    start = 8 + int(data[:8].view(np.uint64)[0])
    data[start:] = np.random.default_rng(1).integers(0, 256, len(data) - start, np.uint8)
    data.tofile(file)
    mj.convert(tmp_path / "hf", tmp_path / "native")
    mj.convert(tmp_path / "native", tmp_path / "back", to="hf")
    assert mj.verify(tmp_path / "hf", tmp_path / "back", by="bytes").good
