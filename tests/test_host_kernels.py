import concurrent.futures
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minimax_jax.errors import LayoutError
from minimax_jax.ops import host, host_matrices
from minimax_jax.ops.assemble import assemble, encode, split
from minimax_jax.ops.fp8 import FP8, requantize
from minimax_jax.ops.scaled import BlockScaled

pytest.importorskip("numba")

BF16, F16, F32 = np.dtype(ml_dtypes.bfloat16), np.dtype(np.float16), np.dtype(np.float32)
FLOATS = pytest.mark.parametrize("dtype", [BF16, F32, F16], ids=str)
SOURCES = pytest.mark.parametrize("source", ["no source", "its own", "another's"])


@pytest.fixture(autouse=True)
def asked(monkeypatch):
    monkeypatch.setenv(host.VARIABLE, "numba")


def by_xla(function, *args, **options):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(host.VARIABLE, "xla")
        return function(*args, **options)


def bits(array):
    array = np.asarray(array)
    return array.view(f"u{array.dtype.itemsize}")


def assert_same(got, want):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert isinstance(one, jax.Array)
        assert one.dtype == other.dtype
        assert np.array_equal(bits(one), bits(other))


def assert_covered_and_same(function, on_host, *args, **options):
    """The kernels do it, and do it as XLA does."""
    done = on_host(*args, **options)
    assert done is not None
    assert_same(done, by_xla(function, *args, **options))
    return done


def codes(rng, *shape):
    return rng.integers(0, 256, shape, dtype=np.uint8).view(FP8)


def weights(rng, dtype, *shape):
    return (rng.standard_normal(shape, dtype=np.float32) * np.float32(0.02)).astype(dtype)


def scales(rng, *shape):
    return np.exp(rng.uniform(-9, 2, shape)).astype(np.float32)


def grid(rows, cols, block, parts=1):
    return -(-rows // block[0]), parts * -(-cols // block[1])


def scaled_experts(rng, experts, parts, rows, cols, block):
    def one():
        return BlockScaled(values=codes(rng, rows, cols), scale_inv=scales(rng, *grid(rows, cols, block)), block=block)

    return [[one() for _ in range(parts)] for _ in range(experts)]


# Rows and columns about the 16 bytes of a vector, the strips and the tiles, blocks that divide them and that do not.
SHAPES = [
    (2, 2, 40, 72, (16, 8)),
    (3, 1, 37, 53, (16, 8)),
    (1, 2, 1, 7, (3, 2)),
    (1, 3, 129, 1, (128, 128)),
    (1, 2, 1600, 33, (128, 128)),
    (2, 2, 256, 384, (128, 128)),
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


def source_of(which, x, block_t, parts):
    """Scales that reproduce `x`, or do not."""
    if which == "no source":
        return None
    rng = np.random.default_rng(7)
    other = scales(rng, x.shape[0], *grid(x.shape[1], x.shape[2] // parts, block_t, parts))
    return other if which == "another's" else np.asarray(by_xla(encode, x, FP8, block=block_t, parts=parts).scale_inv)


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


# --- what is left to XLA ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [np.nan, np.inf, 2.0**-120, 2.0**120, 1e-40])
def test_scales_that_are_not_ordinary_are_left_to_xla(scale):
    tree = scaled_experts(np.random.default_rng(5), 2, 2, 16, 16, (8, 8))
    tree[1][0].scale_inv[1, 1] = scale
    assert host_matrices.assemble(tree, BF16) is None
    assert_same(assemble(tree, BF16), by_xla(assemble, tree, BF16))
    grouped = assemble(tree, None)
    assert host_matrices.split(grouped, 2, F32, block=(8, 8), source=None) is None
    assert host_matrices.encode(grouped, F32, block=(8, 8), parts=2, source=None) is None


@pytest.mark.parametrize("scale", [0.0, -0.0, -0.5])
def test_zero_and_negative_scales(scale):
    tree = scaled_experts(np.random.default_rng(6), 2, 2, 16, 16, (8, 8))
    tree[1][0].scale_inv[1, 1] = scale
    assert_covered_and_same(assemble, host_matrices.assemble, tree, BF16)
    x = weights(np.random.default_rng(6), BF16, 2, 16, 32)
    source = np.full((2, 2, 4), scale, np.float32)
    assert host_matrices.split(x, 2, FP8, block=(8, 8), source=source) is None
    assert_same(split(x, 2, FP8, block=(8, 8), source=source), by_xla(split, x, 2, FP8, block=(8, 8), source=source))


@FLOATS
@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
@SOURCES
def test_weights_that_are_not_finite_are_left_to_xla(dtype, poison, source):
    x = weights(np.random.default_rng(8), dtype, 2, 16, 32)
    given = source_of(source, x, (8, 8), 2)
    x[1, 3, 5] = poison
    assert host_matrices.split(x, 2, FP8, block=(8, 8), source=given) is None
    got = split(x, 2, FP8, block=(8, 8), source=given)
    assert_same(got, by_xla(split, x, 2, FP8, block=(8, 8), source=given))
    assert np.isnan(got[1][0].scale_inv).any()


def test_blocks_of_zeros_have_a_scale_of_one():
    x = np.zeros((1, 16, 32), BF16)
    x[0, :, ::2] = -0.0
    ((scaled, _),) = assert_covered_and_same(split, host_matrices.split, x, 2, FP8, block=(8, 8), source=None)
    assert np.all(scaled.scale_inv == 1)
    assert set(bits(scaled.values).flat) == {0, 0x80}


def test_weights_too_small_for_ordinary_scales_are_left_to_xla():
    x = np.full((1, 16, 32), 2.0**-105, np.float32)
    assert host_matrices.split(x, 2, FP8, block=(8, 8), source=None) is None
    assert_same(split(x, 2, FP8, block=(8, 8)), by_xla(split, x, 2, FP8, block=(8, 8)))


def test_traced_arrays_are_left_to_xla():
    tree = scaled_experts(np.random.default_rng(9), 2, 2, 16, 16, (8, 8))
    want = assemble(tree, BF16)
    assert_same(jax.jit(lambda tree: assemble(tree, BF16))(tree), want)
    assert jax.eval_shape(lambda tree: assemble(tree, BF16), tree).shape == want.shape


def test_wrong_scales_reach_no_kernel():
    tree = scaled_experts(np.random.default_rng(10), 1, 1, 16, 16, (8, 8))
    node = jax.tree.unflatten(jax.tree.structure(tree[0][0]), [tree[0][0].values, np.ones((1, 1), np.float32)])
    assert host_matrices.assemble([[node]], BF16) is None
    assert host_matrices.encode(node, BF16, block=(8, 8), parts=1, source=None) is None


def test_mixed_and_empty_experts_reach_no_kernel():
    eight = np.zeros((8, 8), np.float32)
    for tree in ([[eight, eight], [eight]], [[eight], [eight.astype(BF16)]], [[np.zeros((0, 8), np.float32)]], [[]]):
        assert host_matrices.assemble(tree, None) is None
    assert host_matrices.split(eight[None], 3, None, block=(8, 8), source=None) is None


# --- arrays ----------------------------------------------------------------------------------------------------------


def test_results_lie_where_the_arguments_do():
    tree = scaled_experts(np.random.default_rng(11), 2, 2, 16, 16, (8, 8))
    third = jax.devices()[3]
    committed = jax.device_put(tree, third)
    for one in (tree, committed):
        got, want = host_matrices.assemble(one, BF16), by_xla(assemble, one, BF16)
        assert got.devices() == want.devices()
        assert got.committed == want.committed
    with jax.default_device(jax.devices()[2]):
        assert host_matrices.assemble(tree, BF16).devices() == {jax.devices()[2]}


def test_sharded_arrays_are_left_to_xla():
    mesh = jax.make_mesh((2,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    sharded = jax.device_put(np.zeros((2, 16, 32), np.float32), jax.NamedSharding(mesh, jax.P("x")))
    assert host_matrices.split(sharded, 2, None, block=(8, 8), source=None) is None


def test_results_do_not_change_with_their_arguments():
    array = np.ones((16, 16), np.float32)
    grouped = assemble([[array]], None)
    array[:] = 2
    assert np.all(np.asarray(grouped) == 1)


def test_large_results_are_taken_over_without_a_copy():
    memory = host.empty((3, 5), BF16)
    assert host.place_of([memory])(memory).unsafe_buffer_pointer() == memory.ctypes.data


def test_arrays_in_any_order_of_memory():
    array = weights(np.random.default_rng(12), F32, 24, 40)
    want = array.T[None]
    for same in (np.asfortranarray(array), np.repeat(array, 2, 1)[:, ::2]):
        assert np.array_equal(host_matrices.assemble([[same]], None), want)


def test_several_threads_at_a_time():
    trees = [scaled_experts(np.random.default_rng(seed), 4, 2, 256, 256, (128, 128)) for seed in range(8)]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        done = list(pool.map(lambda tree: host_matrices.assemble(tree, BF16), trees))
    for tree, got in zip(trees, done, strict=True):
        assert_same(got, by_xla(assemble, tree, BF16))


# --- the choice ------------------------------------------------------------------------------------------------------


def test_backend_is_what_was_asked_for(monkeypatch):
    assert host.backend() == "numba"
    monkeypatch.setenv(host.VARIABLE, "xla")
    assert host.backend() == "xla"
    assert host_matrices.assemble([[np.zeros((8, 8), np.float32)]], None) is None
    monkeypatch.delenv(host.VARIABLE)
    assert host.backend() == "numba"


def test_little_work_is_not_worth_numba_unless_asked_for(monkeypatch):
    monkeypatch.delenv(host.VARIABLE)
    assert host_matrices.assemble([[np.zeros((8, 8), np.float32)]], None) is None
    assert host_matrices.assemble([[np.zeros((1024, 1024), np.float32)]], None) is not None


def test_an_unknown_backend_is_refused(monkeypatch):
    monkeypatch.setenv(host.VARIABLE, "fortran")
    with pytest.raises(LayoutError, match="fortran"):
        host.backend()


def in_a_process(script, **environment):
    done = subprocess.run(
        [sys.executable, "-c", script], env=os.environ | environment, capture_output=True, text=True, check=True
    )
    return done.stdout.split()


WITHOUT_NUMBA = """
import sys
sys.modules["numba"] = None
from minimax_jax.errors import LayoutError
from minimax_jax.ops import host
try:
    print(host.backend())
except LayoutError as error:
    print(error.problems[0].remedy)
"""


def test_without_numba_xla_is_taken():
    assert in_a_process(WITHOUT_NUMBA, **{host.VARIABLE: ""}) == ["xla"]
    assert "'minimax_jax[fast]'," in in_a_process(WITHOUT_NUMBA, **{host.VARIABLE: "numba"})


def test_numba_is_not_imported_before_it_is_used():
    script = "import sys, minimax_jax.conversion; print('numba' in sys.modules)"
    assert in_a_process(script) == ["False"]


def test_without_a_place_for_a_cache_the_kernels_are_compiled_each_time():
    script = """
import numba.core.caching as caching
caching.CacheImpl._locator_classes = []
import numpy as np
from minimax_jax.ops import host_matrices
print(np.asarray(host_matrices.assemble([[np.arange(6, dtype=np.float32).reshape(2, 3)]], None)).ravel().tolist())
"""
    assert "".join(in_a_process(script)) == "[0.0,3.0,1.0,4.0,2.0,5.0]"
