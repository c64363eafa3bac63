"""The kernels on whole lines of the cache, against numpy and ml_dtypes: every code, every bfloat16, every alignment."""

import hashlib
import sys
from pathlib import Path

import numpy as np
import pytest
from command_line import process
from helpers import BF16, F32
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import F16, require_kernels

from minimax_jax.ops import host
from minimax_jax.ops.fp8 import FP8

require_kernels()
kernels = pytest.importorskip("minimax_jax.ops.kernels_numba")

OF_DTYPES = pytest.mark.parametrize("dtype", [BF16, F16, F32], ids=str)
LINE_BYTES = 64


def placed(rows, cols, dtype, offset):
    """Memory whose rows begin `offset` bytes after a line, and all that is around it."""
    around = np.full(rows * cols * dtype.itemsize + 4 * LINE_BYTES, 0xA5, np.uint8)
    start = -around.ctypes.data % LINE_BYTES + LINE_BYTES + offset
    stop = start + rows * cols * dtype.itemsize
    return around[start:stop].view(dtype).reshape(rows, cols), (around[:start], around[stop:])


def read_only(array):
    array.flags.writeable = False
    return array


@OF_DTYPES
@pytest.mark.parametrize("offset", [0, 16, 2 * LINE_BYTES - 4])
@pytest.mark.parametrize("block", [(128, 128), (64, 32), (96, 100)], ids=str)
def test_every_code_is_decoded_and_turned_wherever_it_goes(dtype, offset, block):
    rng, rows, cols = np.random.default_rng(0), 320, 200
    source = read_only(np.resize(rng.permutation(256), (rows, cols)).astype(np.uint8))
    scales = rng.uniform(0.5, 1, (-(-rows // block[0]), -(-cols // block[1]))).astype(np.float32) * np.float32(1e-3)
    scales[0, 0], scales[1, 1] = 0, -scales[1, 1]
    spread = scales.repeat(block[0], 0).repeat(block[1], 1)[:rows, :cols]
    want = (source.view(FP8).astype(np.float32) * spread).astype(dtype)
    turned, around = placed(cols, rows, dtype, offset)
    kernels.decode_transposed((source,), (read_only(scales),), block, host.bits(turned))
    assert np.array_equal(host.bits(turned), host.bits(np.ascontiguousarray(want.T)))
    straight, beside = placed(rows, cols, dtype, offset)
    kernels.decode(source, scales, block, 1, host.bits(straight))
    assert np.array_equal(host.bits(straight), host.bits(want))
    assert all(np.all(memory == 0xA5) for memory in (*around, *beside))


@settings(max_examples=60, deadline=None)
@given(
    st.floats(1, 2, exclude_max=True, width=32) | st.sampled_from([1.0, 1.125, 1.25, 1.5, 1.75]),
    st.integers(-100, 108),
    st.booleans(),
)
def test_every_bfloat16_that_has_a_code_gets_it(significand, exponent, given_scales):
    """In blocks of one scale: all magnitudes up to that of the largest code, of either sign."""
    scale = np.ldexp(np.float32(significand), exponent)
    size = np.arange(0x7F80, dtype=np.uint16).view(BF16).astype(np.float32)
    size = np.append(size, (448 * scale).astype(BF16).astype(np.float32))
    size = size[size <= 448 * scale]
    every = np.resize(np.concatenate([size, -size]), (32 * 128, 128)).astype(BF16)
    codes = np.zeros(every.shape, np.uint8)
    scales = np.full((32, 1), scale, np.float32)
    if given_scales:
        every = (every.astype(np.float32) / scale).astype(FP8)
        every = (every.astype(np.float32) * scale).astype(BF16)  # now they are what these scales reproduce
    state = kernels.encode(read_only(host.bits(every)), 0, 128, (128, 128), scales, given_scales, codes, False)
    amax = np.abs(every.astype(np.float32)).reshape(32, -1).max(1)
    used = np.full(32, scale) if given_scales else amax / np.float32(448)
    want = (every.astype(np.float32) / used.repeat(128)[:, None].astype(np.float32)).astype(FP8)
    assert state == kernels.DONE
    assert np.array_equal(scales[:, 0], used.astype(np.float32))
    assert np.array_equal(codes, want.view(np.uint8))
    turned = np.zeros(codes.T.shape, np.uint8)
    kernels.encode(read_only(host.bits(every)), 0, 128, (128, 128), scales, True, turned, True)
    assert not given_scales or np.array_equal(turned, codes.T)


@OF_DTYPES
@pytest.mark.parametrize("transposed", [False, True])
def test_weights_that_are_not_finite_keep_no_scales(dtype, transposed):
    """Under scales of every significand: what such weights have for a code must not pass for theirs."""
    codes = np.zeros((64, 1) if transposed else (1, 64), np.uint8)
    for number in np.array([np.nan, -np.nan, np.inf, -np.inf], dtype):
        weights = np.zeros((1, 64), dtype)
        weights[0, 7] = number
        significands = np.linspace(1, 2, 128, endpoint=False, dtype=np.float32)
        for scales in np.ldexp(significands[:, None], [*range(-16, 0), 17]).reshape(-1, 1, 1):
            call = read_only(host.bits(weights)), 0, 64, (128, 128), scales, True, codes, transposed
            assert kernels.encode(*call) == kernels.CHANGED


def test_all_of_it_is_the_same_in_instructions_that_most_processors_have(monkeypatch):
    monkeypatch.setenv("NUMBA_ENABLE_AVX", "0")
    plain = "-n", "0", "-p", "no:cacheprovider"
    done = process(sys.executable, "-m", "pytest", *plain, __file__, "-k", "every")
    assert done.returncode == 0, done.stdout


def test_what_numba_kept_is_out_of_date_when_a_module_beside_it_changes():
    folder = Path(kernels.__file__).parent
    pieces = b"".join((folder / f"kernels_{name}.py").read_bytes() for name in ("bits", "encode", "lanes", "simd"))
    assert hashlib.sha256(pieces).hexdigest() == kernels.PIECES
