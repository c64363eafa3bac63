"""Random weights in FP8 with their block scales, as one node of a pytree."""

from __future__ import annotations

import jax.numpy as jnp
import ml_dtypes
import numpy as np

from minimax_jax.ops.checks import grid_shape
from minimax_jax.ops.scaled import BlockScaled

E4M3 = ml_dtypes.float8_e4m3fn


def random_scaled(rng, shape, block=(16, 8)):
    codes = rng.choice(np.arange(0x7F, dtype=np.uint8), shape) | rng.choice(np.uint8([0, 0x80]), shape)
    scale = np.exp2(rng.uniform(-13, -7, grid_shape(shape, block))).astype(np.float32)
    return BlockScaled(values=jnp.asarray(codes.view(E4M3)), scale_inv=jnp.asarray(scale), block=block)
