"""Scenarios of several processes: Hugging Face tensors to native ones on meshes. `ranks` runs them."""

import torch
import torch.distributed as dist
from nemo_oracle import assert_same, create_dtensor_from_local, nemo_adapter
from nemo_oracle import our_adapter as ours
from rank_tensors import assert_pieces_of, checkpoint, config, distribute, is_expert, mesh_of, piece, reference, whole
from ranks import scenario
from torch.distributed.tensor import DTensor, Replicate, Shard

from minimax_jax.errors import LayoutError

# ---- from Hugging Face


@scenario
def experts_of_a_rank():
    cfg, mesh = config(num_local_experts=4), mesh_of(ep=dist.get_world_size())
    native = ours(cfg).from_hf(checkpoint(cfg), mesh)
    assert_pieces_of(native, cfg, mesh, (Shard(0),))
    nemo = nemo_adapter(cfg).from_hf(checkpoint(cfg), mesh)
    for name in filter(is_expert, native):
        assert native[name].placements == nemo[name].placements and native[name].device_mesh == nemo[name].device_mesh
        assert_same(native[name].to_local(), nemo[name].to_local())


@scenario
def experts_that_do_not_divide():
    cfg, mesh = config(num_local_experts=5), mesh_of(ep=dist.get_world_size())
    assert_pieces_of(ours(cfg).from_hf(checkpoint(cfg), mesh), cfg, mesh, (Shard(0),))


@scenario
def no_more_than_the_experts_of_a_rank_are_needed():
    cfg, mesh = config(num_local_experts=4), mesh_of(ep=dist.get_world_size())
    first = mesh.get_local_rank() * 4 // mesh.size()
    mine = {str(expert) for expert in range(first, first + 4 // mesh.size())}
    partial = {key: t for key, t in checkpoint(cfg).items() if ".experts." not in key or key.split(".")[5] in mine}
    assert len(partial) < len(checkpoint(cfg))
    assert_pieces_of(ours(cfg).from_hf(dict(partial), mesh), cfg, mesh, (Shard(0),))
    del partial[next(key for key in partial if ".experts." in key)]
    try:
        ours(cfg).from_hf(partial, mesh)
    except LayoutError as error:
        assert "w1.weight" in str(error)
    else:
        raise AssertionError("an expert of this rank was missing")


@scenario
def experts_and_the_hidden_axis():
    cfg = config(num_local_experts=3)
    mesh = mesh_of(ep_shard=2, ep=dist.get_world_size() // 2)
    native = ours(cfg).from_hf(checkpoint(cfg), mesh)  # 320 / 2 and 192 / 2: no shard ends with a block
    assert_pieces_of(native, cfg, mesh, (Shard(1), Shard(0)))


@scenario
def experts_and_replicas():
    cfg = config(num_local_experts=3)
    mesh = mesh_of(ep_replicate=2, ep=dist.get_world_size() // 2)
    assert_pieces_of(ours(cfg).from_hf(checkpoint(cfg), mesh), cfg, mesh, (Replicate(), Shard(0)))


@scenario
def placements_are_nemos():
    cfg = config(num_local_experts=4)
    half = dist.get_world_size() // 2
    meshes = (
        {"ep": 2 * half},
        {"ep_shard": 1, "ep": 2 * half},
        {"ep_shard": 2, "ep": half},
        {"ep_replicate": 2, "ep_shard": half, "ep": 1},
        {"ep_replicate": 1, "ep_shard": 2, "ep": half},
    )
    for dims in meshes:
        mesh = mesh_of(**dims)
        native = ours(cfg).from_hf(checkpoint(cfg), mesh)
        nemo = create_dtensor_from_local(torch.zeros(1, 1, 1), mesh)
        for name in filter(is_expert, native):
            assert native[name].placements == nemo.placements, (dims, native[name].placements, nemo.placements)
            assert native[name].device_mesh == nemo.device_mesh
            assert_same(whole(native[name]), reference(cfg)[name])


@scenario
def other_meshes_are_refused():
    try:
        ours(config()).from_hf(checkpoint(config()), mesh_of(tp=dist.get_world_size()))
    except LayoutError as error:
        assert "tp" in str(error)
    else:
        raise AssertionError("a mesh without expert dimensions")


# ---- FP8 matrices cut anywhere


@scenario
def sharded_fp8_matrices():
    cfg, mesh = config(), mesh_of(dp=dist.get_world_size())
    for placement in (Shard(0), Shard(1), Replicate()):
        for scales in (None, Replicate(), Shard(0), Shard(1)):
            tensors = {}
            for key, tensor in checkpoint(cfg).items():
                if ".experts." in key:
                    continue
                if key.endswith("_scale_inv"):
                    tensors[key] = tensor if scales is None else distribute(tensor, mesh, (scales,))
                elif tensor.ndim == 2:
                    tensors[key] = distribute(tensor, mesh, (placement,))
                else:
                    tensors[key] = tensor
            native = ours(cfg).from_hf(tensors)
            for name, tensor in native.items():
                want = reference(cfg)[name]
                if isinstance(tensor, DTensor):
                    assert tensor.placements == (placement,) and tensor.shape == want.shape
                    assert_same(tensor.to_local(), piece(want, mesh, (placement,)))
                else:
                    assert_same(tensor, want)


@scenario
def matrices_of_experts_as_dtensors():
    cfg = config(num_local_experts=4)
    mesh = mesh_of(ep_shard=2, ep=dist.get_world_size() // 2)
    for placement in (Shard(1), Replicate()):
        tensors = {
            key: distribute(tensor, mesh["ep_shard"], (placement,))
            if ".experts." in key and not key.endswith("_scale_inv")
            else tensor
            for key, tensor in checkpoint(cfg).items()
        }
        assert_pieces_of(ours(cfg).from_hf(dict(tensors), mesh), cfg, mesh, (Shard(1), Shard(0)))
    wrong = {
        key: distribute(tensor, mesh["ep_shard"], (Shard(0),)) if key.endswith(".w1.weight") else tensor
        for key, tensor in checkpoint(cfg).items()
    }
    untouched = dict(wrong)
    try:
        ours(cfg).from_hf(wrong, mesh)
    except LayoutError as error:
        assert "does not hold" in str(error) and "w1.weight" in str(error)
        assert wrong.keys() == untouched.keys()
    else:
        raise AssertionError("rows that this rank does not hold")


@scenario
def matrices_of_experts_without_a_mesh_of_experts():
    cfg, mesh = config(), mesh_of(dp=dist.get_world_size())
    tensors = {
        key: distribute(tensor, mesh, (Shard(1),)) if ".experts." in key and tensor.element_size() == 1 else tensor
        for key, tensor in checkpoint(cfg).items()
    }
    assert_pieces_of(ours(cfg).from_hf(tensors), cfg, mesh, (Shard(1),))
