import gc

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch
from jax.sharding import NamedSharding, PartitionSpec

from minimax_jax.errors import LayoutError
from torch_bridge.arrays import TORCH, as_numpy, to_jax, to_torch

ALL = [(name, dtype) for name, dtype in TORCH.items()]
NARROW = [(name, dtype) for name, dtype in ALL if dtype.itemsize < 8 or name == "C64"]
CROSSING = [(torch.float32, 0x3F800000), (torch.bfloat16, 0x3F80), (torch.float8_e4m3fn, 0x38)]
NUMPY = {torch.float32: np.float32, torch.bfloat16: ml_dtypes.bfloat16, torch.float8_e4m3fn: ml_dtypes.float8_e4m3fn}


def random(dtype, *shape):
    """A tensor of random bits, of boolean ones for bool."""
    size = torch.Size(shape).numel() * dtype.itemsize
    numbers = torch.randint(0, 2 if dtype == torch.bool else 256, (size,), dtype=torch.uint8)
    return numbers.view(dtype).reshape(shape)


def bits(array):
    return np.ascontiguousarray(array).view(np.uint8).tolist()


def raw(tensor):
    return (tensor if tensor.ndim else tensor[None]).contiguous().view(torch.uint8).flatten().tolist()


# ---- torch to jax


@pytest.mark.parametrize(("name", "dtype"), NARROW)
@pytest.mark.parametrize("shape", [(3, 5), (), (0, 4), (128, 1)])
def test_bits_cross_both_ways(name, dtype, shape):
    tensor = random(dtype, *shape)
    array = to_jax(tensor)
    assert array.shape == shape
    assert bits(np.asarray(array).reshape(-1)) == raw(tensor)
    back = to_torch(array)
    assert (back.dtype, back.shape) == (dtype, tensor.shape)
    assert raw(back) == raw(tensor)


@pytest.mark.parametrize(("dtype", "one"), CROSSING)
def test_jax_sees_what_is_written_to_the_tensor(dtype, one):
    tensor = torch.zeros(64, 64, dtype=dtype)
    array = to_jax(tensor)
    assert array.unsafe_buffer_pointer() == tensor.data_ptr()
    tensor[3, 5] = 1.0
    assert np.asarray(array)[3, 5] == 1
    assert bits(np.asarray(array)[3, 5]) == list(one.to_bytes(dtype.itemsize, "little"))


@pytest.mark.parametrize(("dtype", "one"), CROSSING)
def test_torch_shares_the_memory_of_jax(dtype, one):
    array = jnp.ones((64, 64), NUMPY[dtype])
    tensor = to_torch(array)
    assert tensor.data_ptr() == array.unsafe_buffer_pointer()
    assert raw(tensor[:1, :1]) == list(one.to_bytes(dtype.itemsize, "little"))


@pytest.mark.parametrize("dtype", NUMPY)
def test_an_array_outlives_its_tensor(dtype):
    tensor = random(dtype, 512, 512)
    want, array = raw(tensor), to_jax(tensor)
    del tensor
    gc.collect()
    taken = [torch.zeros(512, 512, dtype=dtype) for _ in range(8)]  # what was freed would be used again
    assert bits(np.asarray(array).reshape(-1)) == want
    assert len(taken) == 8


@pytest.mark.parametrize("dtype", NUMPY)
def test_a_tensor_outlives_its_array(dtype):
    source = random(dtype, 512, 512)
    array = jax.device_put(as_numpy(source), may_alias=False)
    tensor = to_torch(array)
    del array
    gc.collect()
    taken = [jnp.zeros((512, 512), NUMPY[dtype]) for _ in range(8)]
    assert raw(tensor) == raw(source)
    assert len(taken) == 8


def test_a_parameter_crosses_without_its_gradient():
    parameter = torch.nn.Parameter(torch.ones(64))
    assert to_jax(parameter).unsafe_buffer_pointer() == parameter.data_ptr()


def test_memory_that_is_not_aligned_is_copied_unless_that_is_forbidden():
    tensor = torch.arange(100, dtype=torch.float32)[1:]
    array = to_jax(tensor)
    assert array.tolist() == tensor.tolist()
    with pytest.raises(LayoutError, match="multiple of 64"):
        to_jax(tensor, copy=False)
    aligned = torch.zeros(64)
    assert to_jax(aligned, copy=False).unsafe_buffer_pointer() == aligned.data_ptr()


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (torch.zeros(4, 6).T, "not contiguous"),
        (torch.zeros(4, 6)[:, ::2], "not contiguous"),
        (torch.zeros(1, 6).expand(4, 6), "not contiguous"),
        (torch.zeros(4, dtype=torch.complex64).conj(), "not contiguous"),
        (torch.zeros(4, device="meta"), "no such array"),
        (torch.zeros(4, 4).to_sparse(), "no such array"),
        (torch.zeros(4, dtype=torch.complex128), "no such array"),
        (torch.zeros(4, dtype=torch.float64), "narrow"),
        (torch.zeros(4, dtype=torch.int64), "narrow"),
    ],
)
def test_a_tensor_that_cannot_cross_is_named(tensor, message):
    with pytest.raises(LayoutError, match=message) as caught:
        to_jax(tensor)
    assert str(tensor.dtype) in str(caught.value)


def test_64_bits_cross_where_jax_has_them():
    with jax.enable_x64(True):
        assert to_jax(torch.tensor([2**40 + 1])).tolist() == [2**40 + 1]


# ---- jax and numpy to torch


@pytest.mark.parametrize(("name", "dtype"), ALL)
@pytest.mark.parametrize("shape", [(3, 5), (), (0, 4)])
def test_numpy_views_share_memory_both_ways(name, dtype, shape):
    tensor = random(dtype, *shape)
    view = as_numpy(tensor)
    assert view.shape == shape
    assert bits(view.reshape(-1)) == raw(tensor)
    back = to_torch(view)
    assert (back.dtype, back.shape) == (dtype, tensor.shape)
    assert not tensor.numel() or view.__array_interface__["data"][0] == tensor.data_ptr() == back.data_ptr()


def test_numpy_views_have_the_strides_of_the_tensor():
    tensor = torch.arange(24, dtype=torch.bfloat16).reshape(4, 6)
    for part in (tensor.T, tensor[1:, ::2], tensor[:, 3]):
        view = as_numpy(part)
        assert view.dtype == ml_dtypes.bfloat16
        assert view.astype(np.float32).tolist() == part.float().tolist()
        assert raw(to_torch(view)) == raw(part)
    as_numpy(tensor.T)[5, 0] = 100
    assert tensor[0, 5] == 100


@pytest.mark.parametrize("tensor", [torch.zeros(4, device="meta"), torch.zeros(4, dtype=torch.complex128)])
def test_tensors_without_a_numpy_view_are_named(tensor):
    with pytest.raises(LayoutError, match="no numpy view"):
        as_numpy(tensor)


def read_only():
    array = np.zeros(4, np.float32)
    array.flags.writeable = False
    return array


def deleted():
    array = jnp.zeros(4)
    array.delete()
    return array


def spread():
    mesh = jax.make_mesh((2,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    return jax.device_put(np.zeros(4, np.float32), NamedSharding(mesh, PartitionSpec("x")))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (read_only, "read-only"),
        (deleted, "deleted"),
        (spread, "several devices"),
        (lambda: np.zeros(4, np.float32)[::-1], "strides"),
        (lambda: np.zeros(4, ">f4"), "torch lacks"),
        (lambda: np.zeros(4, ml_dtypes.int4), "torch lacks"),
    ],
)
def test_an_array_that_cannot_cross_is_named(make, message):
    with pytest.raises(LayoutError, match=message):
        to_torch(make())


def test_a_traced_array_cannot_cross():
    with pytest.raises(LayoutError, match="traced"):
        jax.jit(to_torch)(jnp.zeros(4))
