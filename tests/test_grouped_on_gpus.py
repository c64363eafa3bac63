"""The form in which a GPU quantises grouped weights, against that of all else, on a CPU."""

import jax
import numpy as np
import pytest
from fp8_cases import BF16
from helpers import bits

from minimax_jax.ops import grouped

BLOCK = (128, 128)


@pytest.mark.parametrize(("parts", "rows", "given"), [(1, 256, False), (2, 200, False), (2, 256, True), (1, 200, True)])
def test_what_gpus_do_is_the_same(parts, rows, given):
    x = np.random.default_rng(4).standard_normal((2, 384, parts * rows)).astype(BF16)
    x[0, 5, 5], x[1, 7, 7] = np.nan, -0.0
    grid = np.exp2(np.random.default_rng(5).uniform(-9, 0, (2, 3, parts * -(-rows // 128)))).astype(np.float32)
    arrays = (x, grid) if given else (x,)
    first, last = (
        jax.jit(lambda *arrays, form=form: form(*arrays, parts=parts, block=BLOCK))(*arrays)
        for form in (grouped._transposed_first, grouped._transposed_last)
    )
    assert len(first) == (parts if given else 2 * parts)
    for one, other in zip(first, last, strict=True):
        np.testing.assert_array_equal(bits(one), bits(other))
