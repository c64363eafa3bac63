"""Tensors of a rank: its pieces of what NeMo AutoModel makes of a checkpoint in one process."""

import contextlib
import functools
import math

import torch.distributed as dist
from helpers import config as config_of
from nemo_oracle import assert_same, nemo_adapter
from nemo_oracle import checkpoint as random_checkpoint
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.debug import _clear_sharding_prop_cache
from torch.testing._internal.distributed.fake_pg import FakeStore

REPLICATE = Replicate()


def config(**sizes):
    """One layer; 320 hidden and 192 inter are no whole blocks, nor are their halves and quarters."""
    return config_of(num_hidden_layers=1, **sizes)


_checkpoint = functools.cache(random_checkpoint)


def checkpoint(cfg):
    return dict(_checkpoint(cfg))


@functools.cache
def reference(cfg):
    """NeMo's own result, of plain tensors on one rank, where it is right."""
    return nemo_adapter(cfg).from_hf(checkpoint(cfg))


def mesh_of(**dims):
    return init_device_mesh("cpu", tuple(dims.values()), mesh_dim_names=tuple(dims))


@contextlib.contextmanager
def rank_of(rank, **dims):
    """A mesh as one of its ranks sees it, without the others: it cannot communicate."""
    _clear_sharding_prop_cache()  # what torch remembers of operations on DTensors is of the rank that came before
    sizes = tuple(dims.values())
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=math.prod(sizes))
    try:
        yield mesh_of(**dims)
    finally:
        dist.destroy_process_group()


def is_expert(name):
    return name.endswith("_projs")


def piece(tensor, mesh, placements):
    """What this rank holds of a full tensor, by torch.chunk."""
    for dim, placement in enumerate(placements):
        if isinstance(placement, Shard):
            chunks = list(tensor.chunk(mesh.size(dim), dim=placement.dim))
            place = mesh.get_local_rank(dim)
            tensor = chunks[place] if place < len(chunks) else tensor.narrow(placement.dim, 0, 0)
    return tensor.contiguous()


def distribute(tensor, mesh, placements):
    """A DTensor of any dtype: `distribute_tensor` does not know FP8 over gloo."""
    local = piece(tensor, mesh, placements).clone()
    return DTensor.from_local(local, mesh, placements, shape=tensor.shape, stride=tensor.stride())


def whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def assert_pieces_of(native, cfg, mesh, placements):
    want = reference(cfg)
    assert native.keys() == want.keys()
    for name, tensor in native.items():
        if is_expert(name):
            assert tensor.shape == want[name].shape
            assert tuple(tensor.placements) == placements and tensor.device_mesh == mesh
            assert_same(tensor.to_local(), piece(want[name], mesh, placements))
        assert_same(whole(tensor), want[name])


def native_dtensors(cfg, mesh, experts, others=(REPLICATE,)):
    return {
        name: distribute(tensor, mesh, experts if is_expert(name) else others) if tensor.ndim > 1 else tensor
        for name, tensor in reference(cfg).items()
    }
