"""Arrays for the kernels on the host, and what XLA makes of them."""

import jax
import numpy as np
import pytest
from helpers import BF16, F32, bits

from minimax_jax.ops import host
from minimax_jax.ops.assemble import encode
from minimax_jax.ops.fp8 import FP8
from minimax_jax.ops.scaled import BlockScaled

F16 = np.dtype(np.float16)
FLOATS = pytest.mark.parametrize("dtype", [BF16, F32, F16], ids=str)
SOURCES = pytest.mark.parametrize("source", ["no source", "its own", "another's"])


def require_kernels():
    """Skip a module about the kernels where numba is not installed, or is told not to compile."""
    if pytest.importorskip("numba").config.DISABLE_JIT:
        pytest.skip("NUMBA_DISABLE_JIT is set", allow_module_level=True)


def by_xla(function, *args, **options):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(host.VARIABLE, "xla")
        return function(*args, **options)


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


def source_of(which, x, block_t, parts):
    """Scales that reproduce `x`, or do not."""
    if which == "no source":
        return None
    rng = np.random.default_rng(7)
    other = scales(rng, x.shape[0], *grid(x.shape[1], x.shape[2] // parts, block_t, parts))
    return other if which == "another's" else np.asarray(by_xla(encode, x, FP8, block=block_t, parts=parts).scale_inv)
