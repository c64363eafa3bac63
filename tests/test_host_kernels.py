"""The kernels on the host, bit for bit against XLA."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import BF16, F32, bits
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import (
    F16,
    FLOATS,
    SOURCES,
    assert_covered_and_same,
    assert_same,
    by_xla,
    codes,
    grid,
    require_kernels,
    scaled_experts,
    scales,
    source_of,
    weights,
)

from minimax_jax.ops import host, host_matrices
from minimax_jax.ops.assemble import assemble, encode, split
from minimax_jax.ops.fp8 import FP8, requantize
from minimax_jax.ops.scaled import BlockScaled

require_kernels()


@pytest.fixture(autouse=True)
def asked(monkeypatch):
    monkeypatch.setenv(host.VARIABLE, "numba")


# Rows and columns about the lines and the tiles, blocks that divide them and that do not, nor are divided by them.
SHAPES = [
    (2, 2, 40, 72, (16, 8)),
    (3, 1, 37, 53, (16, 8)),
    (1, 2, 1, 7, (3, 2)),
    (1, 3, 129, 1, (128, 128)),
    (1, 2, 1600, 33, (128, 128)),
    (2, 2, 256, 384, (128, 128)),
    (1, 2, 192, 200, (64, 64)),
    (1, 2, 192, 200, (96, 48)),
]
OF_SHAPES = pytest.mark.parametrize(("experts", "parts", "rows", "cols", "block"), SHAPES)
OF_SHAPES_AND_FLOATS = pytest.mark.parametrize(
    ("experts", "parts", "rows", "cols", "block", "dtype"),
    [(*shape, BF16) for shape in SHAPES] + [(*shape, dtype) for shape in SHAPES[:2] for dtype in (F32, F16)],
)


@OF_SHAPES_AND_FLOATS
def test_fp8_experts_are_grouped_as_by_xla(experts, parts, rows, cols, block, dtype):
    tree = scaled_experts(np.random.default_rng(0), experts, parts, rows, cols, block)
    assert_covered_and_same(assemble, host_matrices.assemble, tree, dtype)


@OF_SHAPES
def test_fp8_experts_are_grouped_in_fp8_as_by_xla_and_go_back(experts, parts, rows, cols, block):
    tree = scaled_experts(np.random.default_rng(0), experts, parts, rows, cols, block)
    grouped = assert_covered_and_same(assemble, host_matrices.assemble, tree, None)
    back = host_matrices.split(grouped, parts, None, block=block, source=None)
    assert_same(back, jax.tree.map(jnp.asarray, [tuple(expert) for expert in tree]))


@OF_SHAPES_AND_FLOATS
def test_fp8_tensors_are_decoded_as_by_xla(experts, parts, rows, cols, block, dtype):
    rng = np.random.default_rng(1)
    block_t = (block[1], block[0])
    grouped = BlockScaled(
        values=codes(rng, experts, cols, parts * rows),
        scale_inv=scales(rng, experts, *grid(cols, rows, block_t, parts)),
        block=block_t,
        parts=parts,
    )
    assert_covered_and_same(split, host_matrices.split, grouped, parts, dtype, block=block, source=None)
    assert_covered_and_same(encode, host_matrices.encode, grouped, dtype, block=block_t, parts=parts, source=None)


@OF_SHAPES
@pytest.mark.parametrize("dtype", [BF16, F32, F16, np.dtype(np.int8)], ids=str)
def test_arrays_are_grouped_byte_for_byte(experts, parts, rows, cols, block, dtype):
    rng = np.random.default_rng(2)
    raw = rng.integers(0, 256, (experts, parts, rows, cols, dtype.itemsize), dtype=np.uint8)  # every kind of NaN too
    tree = [tuple(raw[e, p].view(dtype)[..., 0] for p in range(parts)) for e in range(experts)]
    grouped = host_matrices.assemble(tree, None)
    want = np.stack([np.concatenate([bits(part).T for part in expert], axis=1) for expert in tree])
    assert np.array_equal(bits(grouped), want)
    for got, expert in zip(host_matrices.split(grouped, parts, None, block=block, source=None), tree, strict=True):
        assert all(np.array_equal(bits(one), bits(other)) for one, other in zip(got, expert, strict=True))


@OF_SHAPES_AND_FLOATS
@SOURCES
def test_weights_are_quantised_as_by_xla(experts, parts, rows, cols, block, dtype, source):
    rng = np.random.default_rng(3)
    block_t = (block[1], block[0])
    x = weights(rng, dtype, experts, cols, parts * rows)
    x[0, 0, 0], x[-1, -1, -1] = -0.0, 0.0
    if source != "no source":  # weights that have been FP8 before
        x = np.array(by_xla(encode, by_xla(encode, x, FP8, block=block_t, parts=parts), dtype, block=block_t))
    given = source_of(source, x, block_t, parts)
    assert_covered_and_same(split, host_matrices.split, x, parts, FP8, block=block, source=given)
    if parts == 1 or given is None:
        assert_covered_and_same(encode, host_matrices.encode, x, FP8, block=block_t, parts=parts, source=given)


@FLOATS
def test_each_matrix_keeps_its_scales_or_not_by_itself(dtype):
    rng, block, parts = np.random.default_rng(4), (8, 16), 2
    fp8 = BlockScaled(
        values=(
            rng.integers(0, 126, (3, 24, 96), dtype=np.uint8) | rng.integers(0, 2, (3, 24, 96), dtype=np.uint8) << 7
        ).view(FP8),
        scale_inv=np.ldexp(np.float32(1), rng.integers(-9, 2, (3, 3, 6))).astype(np.float32),
        block=block,
        parts=parts,
    )
    x = np.array(fp8.dequantize(dtype))
    x[1, 23, 90] *= np.asarray(1.25, dtype)  # the second part of the second matrix
    x[2, 0, 0] = 0.0
    x[2, 0, 0] = (
        -x[2, 0, 0] if np.asarray(fp8.values)[2, 0, 0].view(np.uint8) == 0 else x[2, 0, 0] + np.asarray(1e-4, dtype)
    )
    scaled, kept = host_matrices.quantize(x, fp8.scale_inv, block=block, parts=parts)
    assert kept.tolist() == [[True, True], [True, False], [False, True]]
    for part, columns in enumerate((slice(0, 48), slice(48, 96))):
        values, scale_inv, want_kept = requantize(
            x[..., columns], fp8.scale_inv[..., 3 * part : 3 * part + 3], block=block
        )
        assert kept[:, part].tolist() == np.asarray(want_kept).tolist()
        assert np.array_equal(bits(scaled.values)[..., columns], bits(values))
        assert np.array_equal(bits(scaled.scale_inv)[..., 3 * part : 3 * part + 3], bits(scale_inv))
    assert np.array_equal(bits(scaled.values)[0], bits(fp8.values)[0])


@FLOATS
def test_quantised_halves_are_ties_to_even(dtype):
    """Every midpoint between codes, and its neighbours in float32 where the dtype has them, under a scale of 1."""
    values = np.arange(127, dtype=np.uint8).view(FP8).astype(np.float32)
    midpoints = (values[1:] + values[:-1]) / 2
    near = np.concatenate(
        [values, midpoints, np.nextafter(midpoints, 1e9), np.nextafter(midpoints, 0), [1e4, 464, 465]]
    )
    x = np.concatenate([near, -near]).astype(dtype)[None]
    x = np.concatenate([x, np.full((1, x.shape[1]), 448, dtype)])
    one = np.ones((1, 1, 1), np.float32)
    encoded, kept = host_matrices.quantize(x[None, :, :127], one, block=(2, 2**20), parts=1)
    assert kept.all()
    assert np.array_equal(bits(encoded.values)[0, 0], np.arange(127))
    assert_covered_and_same(encode, host_matrices.encode, x, FP8, block=(2, 1), parts=1, source=None)


@settings(max_examples=30, deadline=None)
@given(
    st.integers(1, 2),
    st.integers(1, 70),
    st.integers(1, 70),
    st.integers(1, 40),
    st.integers(1, 40),
    st.integers(0, 2**32),
)
def test_any_shape_and_block(parts, rows, cols, block_rows, block_cols, seed):
    rng, block = np.random.default_rng(seed), (block_rows, block_cols)
    tree = scaled_experts(rng, 2, parts, rows, cols, block)
    want = [
        np.concatenate(
            [
                (
                    np.asarray(p.values, np.float32)
                    * np.repeat(np.repeat(p.scale_inv, block[0], 0), block[1], 1)[:rows, :cols]
                )
                .astype(BF16)
                .T
                for p in expert
            ],
            1,
        )
        for expert in tree
    ]
    grouped = host_matrices.assemble(tree, BF16)
    assert np.array_equal(bits(grouped), bits(np.stack(want)))
    kept = host_matrices.assemble(tree, None)
    assert_same(
        host_matrices.split(kept, parts, None, block=block, source=None),
        jax.tree.map(jnp.asarray, list(map(tuple, tree))),
    )
