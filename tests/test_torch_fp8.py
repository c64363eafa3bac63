import helpers
import ml_dtypes
import numpy as np
import pytest
import torch
from fp8_cases import BLOCK, MINIMAX, random_codes, random_matrix
from hypothesis import given, settings
from hypothesis import strategies as st

from minimax_jax.errors import LayoutError, NumericError
from torch_bridge import fp8
from torch_bridge.arrays import as_numpy, to_torch

WEIGHTS = [(torch.float32, np.float32), (torch.bfloat16, ml_dtypes.bfloat16), (torch.float16, np.float16)]
ROUTES = [fp8.dequantize, fp8.dequantize_torch]


def assert_bits(got, want):
    got = as_numpy(got)
    assert got.dtype == want.dtype
    np.testing.assert_array_equal(helpers.bits(got), helpers.bits(want))


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize(("dtype", "np_dtype"), WEIGHTS)
def test_all_codes_under_many_scales(route, dtype, np_dtype):
    codes = np.tile(np.arange(256, dtype=np.uint8), (64, 1)).view(ml_dtypes.float8_e4m3fn)
    scales = np.random.default_rng(0).lognormal(-2, 1, (64, 2)).astype(np.float32)
    got = as_numpy(route(to_torch(codes), to_torch(scales), dtype, block=(1, 128)))
    want = helpers.dequantize(codes, scales, np_dtype, (1, 128))
    number = ~np.isnan(want)
    assert number.sum() == 64 * 254
    assert (np.isnan(got) == ~number).all()
    np.testing.assert_array_equal(helpers.bits(got[number]), helpers.bits(want[number]))


@pytest.mark.parametrize("route", ROUTES)
@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_any_slice(route, data):
    rows, cols = data.draw(st.tuples(st.integers(1, 40), st.integers(1, 40)))
    block = data.draw(st.sampled_from([(4, 4), (8, 3), (1, 16), (64, 64)]))
    codes, scales = random_matrix(np.random.default_rng(rows * 41 + cols), (rows, cols), block)
    top, left = data.draw(st.integers(0, rows)), data.draw(st.integers(0, cols))
    bottom, right = data.draw(st.integers(top, rows)), data.draw(st.integers(left, cols))
    part = np.s_[top:bottom, left:right]
    # Jitted programs are one for each offset and shape: here mostly the torch route earns its keep.
    got = route(to_torch(codes)[part], to_torch(scales), torch.bfloat16, block=block, offset=(top, left))
    assert_bits(got, helpers.dequantize(codes, scales, ml_dtypes.bfloat16, block)[part])


@pytest.mark.parametrize("shape", MINIMAX)
@pytest.mark.parametrize("axis", [0, 1])
def test_every_shard_of_the_published_shapes(shape, axis):
    codes, scales = (to_torch(array) for array in random_matrix(np.random.default_rng(0), shape, BLOCK))
    weights = to_torch(helpers.dequantize(as_numpy(codes), as_numpy(scales), ml_dtypes.bfloat16, BLOCK))
    for ranks in range(2, 65):
        start = 0
        for part, want in zip(codes.chunk(ranks, axis), weights.chunk(ranks, axis), strict=True):
            offset = (start, 0) if axis == 0 else (0, start)
            got = fp8.dequantize_torch(part, scales, torch.bfloat16, block=BLOCK, offset=offset)
            assert torch.equal(got.view(torch.int16), want.view(torch.int16)), (ranks, offset)
            start += part.shape[axis]


def test_the_published_shape_over_eight_ranks():
    codes, scales = (to_torch(a) for a in random_matrix(np.random.default_rng(0), (1536, 3072), (128, 128)))
    want = to_torch(helpers.dequantize(as_numpy(codes), as_numpy(scales), ml_dtypes.bfloat16))
    parts = [fp8.dequantize(part, scales, offset=(192 * rank, 0)) for rank, part in enumerate(codes.chunk(8))]
    assert torch.equal(torch.cat(parts).view(torch.int16), want.view(torch.int16))


@pytest.mark.parametrize("view", [lambda t: t.T, lambda t: t[:, ::2], lambda t: t[3:]])
def test_codes_of_any_strides(view):
    codes, scales = random_matrix(np.random.default_rng(0), (64, 64), (64, 64))
    got = fp8.dequantize(view(to_torch(codes)), to_torch(scales), torch.float32, block=(64, 64), offset=(0, 0))
    want = view(to_torch(helpers.dequantize(codes, scales, np.float32, (64, 64))))
    assert torch.equal(got, want)


@pytest.mark.parametrize(("dtype", "np_dtype"), WEIGHTS)
def test_quantization_has_real_scales(dtype, np_dtype):
    x = np.random.default_rng(0).normal(0, 0.02, (200, 300)).astype(np_dtype)
    x[:128, :128] = 0
    x[130, 140] = -0.0
    want_codes, want_scales = helpers.quantize(x)
    codes, scales = fp8.quantize(to_torch(x))
    assert_bits(codes, want_codes)
    assert_bits(scales, want_scales)
    scales = fp8.scale_of_amax(fp8.block_amax(to_torch(x)))
    assert_bits(scales, want_scales)
    assert_bits(fp8.encode(to_torch(x), scales), want_codes)


def test_a_block_too_small_for_a_scale_counts_as_zero():
    x = torch.full((4, 4), 1e-38)
    for codes, scales in (fp8.quantize(x), (fp8.encode(x, torch.ones(1, 1)), fp8.scale_of_amax(fp8.block_amax(x)))):
        assert scales.tolist() == [[1.0]]
        assert not codes.float().any()


def test_codes_saturate():
    codes = fp8.encode(torch.tensor([[1000.0, -460.0, 448.0]]), torch.ones(1, 1))
    assert codes.float().tolist() == [[448.0, -448.0, 448.0]]


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_quantization_of_any_slice(data):
    rows, cols = data.draw(st.tuples(st.integers(1, 40), st.integers(1, 40)))
    block = data.draw(st.sampled_from([(4, 4), (8, 3), (64, 64)]))
    x = np.random.default_rng(rows * 41 + cols).standard_normal((rows, cols)).astype(np.float32)
    codes, scales = helpers.quantize(x, block)
    cut = data.draw(st.integers(0, rows))
    amax = torch.zeros(scales.shape)
    for start, part in ((0, to_torch(x)[:cut]), (cut, to_torch(x)[cut:])):
        if len(part):
            mine = fp8.block_amax(part, block=block, offset=(start, 0))
            first = start // block[0]
            amax[first : first + len(mine)] = torch.maximum(amax[first : first + len(mine)], mine)
    assert_bits(fp8.scale_of_amax(amax), scales)
    got = fp8.encode(to_torch(x)[cut:], to_torch(scales), block=block, offset=(cut, 0))
    assert_bits(got, codes[cut:])


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_numbers_without_a_code_are_an_error(bad):
    x = torch.ones(4, 4)
    x[1, 2] = bad
    with pytest.raises(NumericError, match="NaN"):
        fp8.quantize(x)
    with pytest.raises(NumericError, match="NaN"):
        fp8.scale_of_amax(fp8.block_amax(x))


@pytest.mark.parametrize(
    ("values", "scales", "offset", "message"),
    [
        (torch.zeros(4, 4), torch.ones(1, 1), None, "dtype of codes"),
        (torch.zeros(4, 4).to(fp8.FP8), torch.ones(1, 1).double(), None, "dtype of scales"),
        (torch.zeros(4, 4).to(fp8.FP8), torch.ones(2, 1), None, "do not fit"),
        (torch.zeros(4, 4).to(fp8.FP8), torch.ones(1, 1), (126, 0), "beyond the scales"),
    ],
)
def test_what_does_not_fit_is_an_error(values, scales, offset, message):
    with pytest.raises(LayoutError, match=message):
        fp8.dequantize(values, scales, offset=offset)


def test_the_meta_device_gives_shapes():
    codes = torch.zeros(200, 300, device="meta").to(fp8.FP8)
    weights = fp8.dequantize(codes, torch.zeros(2, 3, device="meta"))
    assert (weights.shape, weights.dtype, weights.device.type) == ((200, 300), torch.bfloat16, "meta")
    codes, scales = fp8.quantize(weights)
    assert (codes.shape, codes.dtype, scales.shape) == ((200, 300), fp8.FP8, (2, 3))


def test_large_matrices_of_several_experts_at_once():
    rng = np.random.default_rng(0)
    codes, scales = random_codes(rng, (3, 1200, 1300)), rng.random((3, 10, 11), np.float32) + 0.5
    spread = scales.repeat(128, 1).repeat(128, 2)[:, :1200, :1300]
    got = fp8.dequantize(to_torch_codes(codes), torch.from_numpy(scales), torch.float32)
    np.testing.assert_array_equal(got.numpy(), codes.astype(np.float32) * spread)


@pytest.mark.parametrize("dtype", [torch.float64, torch.int32, torch.bool])
def test_large_matrices_of_an_unsupported_dtype_are_refused(dtype):
    codes = to_torch_codes(random_codes(np.random.default_rng(0), (2048, 2560)))
    with pytest.raises(LayoutError, match="unsupported dtype"):
        fp8.dequantize(codes, torch.ones(16, 20), dtype)


def to_torch_codes(codes):
    return torch.from_numpy(codes.view(np.uint8)).view(torch.float8_e4m3fn)
