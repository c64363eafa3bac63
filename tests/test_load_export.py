"""The programs of loading and saving lower for every platform."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

from minimax_jax.models import fill
from minimax_jax.models.export import fetch_rows
from minimax_jax.ops.fp8 import FP8

PLATFORMS = ("cpu", "cuda", "rocm", "tpu")
BF16 = np.dtype(jnp.bfloat16)


def array(shape, dtype):
    return jax.ShapeDtypeStruct(shape, dtype)


def pieces(shape, parts, *, scaled=True, more=0):
    values = array(shape, FP8 if scaled else jnp.bfloat16)
    grid = array((*shape[:-2], shape[-2] // 128 + more, shape[-1] // 128 + more), jnp.float32)
    return [(values, grid) if scaled else (values,)] * parts


def recipe(parts=1, *, grouped=True, offset=(0, 0)):
    return fill.Recipe(dtype=BF16, grouped=grouped, block=(128, 128), offsets=(offset,) * parts, alike=True)


@pytest.mark.parametrize("offset", [(0, 0), (64, 32)])
@pytest.mark.parametrize("scaled", [True, False])
def test_a_portion_is_put_into_a_shard(scaled, offset):
    held = pieces((2, 256, 256), 2, scaled=scaled, more=int(any(offset)))
    arguments = array((8, 256, 512), jnp.uint16), held, (array((), jnp.int32),)
    done = export.export(fill.put, platforms=PLATFORMS)(*arguments, recipe=recipe(2, offset=offset))
    assert done.platforms == PLATFORMS and done.out_avals[0].shape == (8, 256, 512)


@pytest.mark.parametrize("grouped", [True, False])
def test_a_shard_is_made_at_once(grouped):
    shape = (2, 256, 128) if grouped else (256, 128)
    done = export.export(fill.make, platforms=PLATFORMS)(pieces(shape, 1), recipe=recipe(grouped=grouped))
    assert done.platforms == PLATFORMS and done.out_avals[0].dtype == BF16


@pytest.mark.parametrize("layered", [True, False])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32, FP8])
def test_experts_are_fetched(dtype, layered):
    whole = array((3, 8, 64, 32) if layered else (8, 64, 32), dtype)
    indices = (array((), jnp.int32),) * 2
    options = {"count": 4, "layered": layered, "everywhere": None}
    done = export.export(fetch_rows, platforms=PLATFORMS)(whole, *indices, **options)
    assert done.out_avals[0].shape == (4, 64, 32)
