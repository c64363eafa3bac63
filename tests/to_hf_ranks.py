"""Scenarios of several processes: native tensors on meshes to Hugging Face ones, and back. `ranks` runs them."""

import torch
import torch.distributed as dist
from lora_cases import CFG as LORA_CFG
from lora_cases import NEMO, random_lora
from nemo_oracle import assert_same, differences, nemo_adapter
from nemo_oracle import our_adapter as ours
from rank_tensors import (
    REPLICATE,
    assert_pieces_of,
    checkpoint,
    config,
    distribute,
    mesh_of,
    native_dtensors,
    piece,
    reference,
    whole,
)
from ranks import scenario
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch_helpers import in_torch

from minimax_jax.errors import LayoutError, NumericError

# ---- to Hugging Face


@scenario
def to_hf_of_dtensors():
    cfg, mesh = config(num_local_experts=4), mesh_of(dp=dist.get_world_size())
    want = ours(cfg).to_hf(reference(cfg))
    for placement, part in ((Shard(0), None), (Shard(1), Shard(1)), (Replicate(), Replicate())):
        native = native_dtensors(cfg, mesh, (placement,))
        hf = ours(cfg).to_hf(native)
        if placement != Shard(1):  # which NeMo refuses
            assert list(hf) == list(nemo_adapter(cfg).to_hf(dict(native)))
        assert list(hf) == ours(cfg).get_hf_state_dict_keys(native)
        for key, tensor in hf.items():
            if ".experts." in key and part is None:
                assert not isinstance(tensor, DTensor)
                assert_same(tensor, want[key])
            elif ".experts." in key:
                assert tensor.placements == (part,) and tensor.to_local().is_contiguous()
                assert_same(tensor.to_local(), piece(want[key], mesh, (part,)))
            assert_same(whole(tensor), want[key])
        back = ours(cfg).from_hf(hf) if part is not None else reference(cfg)
        assert all(torch.equal(whole(tensor), reference(cfg)[name]) for name, tensor in back.items())


@scenario
def to_hf_of_experts_that_do_not_divide():
    cfg, mesh = config(num_local_experts=5), mesh_of(ep_shard=2, ep=dist.get_world_size() // 2)
    native = native_dtensors(cfg, mesh, (Shard(1), Shard(0)), (Replicate(), Replicate()))
    hf, want = ours(cfg).to_hf(native), ours(cfg).to_hf(reference(cfg))
    experts = {int(key.split(".")[5]) for key in hf if ".experts." in key}
    assert experts == set(piece(torch.arange(5), mesh, (Replicate(), Shard(0))).tolist())
    assert all(torch.equal(whole(tensor), want[key]) for key, tensor in hf.items())
    assert_pieces_of(ours(cfg).from_hf(hf, mesh), cfg, mesh, (Shard(1), Shard(0)))


@scenario
def quantization_of_dtensors():
    cfg, mesh = config(num_local_experts=4), mesh_of(dp=dist.get_world_size())
    want = ours(cfg).to_hf(reference(cfg), quantization=True)
    for placement in (Shard(0), Shard(1), Replicate()):
        native = native_dtensors(cfg, mesh, (placement,), (placement,))
        hf = ours(cfg).to_hf(native, quantization=True)
        for key, tensor in hf.items():
            if isinstance(tensor, DTensor):
                assert_same(tensor.to_local(), piece(want[key], mesh, tensor.placements))
            else:
                assert_same(tensor, want[key])
        assert len(hf) == len(want) or placement == Shard(0)


@scenario
def a_nan_of_one_rank_is_every_ranks_error():
    cfg, mesh = config(), mesh_of(dp=dist.get_world_size())
    name = "model.layers.0.self_attn.q_proj.weight"
    for rank in range(dist.get_world_size()):  # 160 or 80 columns each: blocks of 128 are shared
        weight = distribute(reference(cfg)[name].clone(), mesh, (Shard(1),))
        if dist.get_rank() == rank:
            weight.to_local()[0] = float("nan")
        try:
            ours(cfg).to_hf({name: weight}, quantization=True)
        except NumericError as error:
            assert name in str(error)
        else:
            raise AssertionError(f"NaN of rank {rank} was quantised")


@scenario
def layouts_that_cannot_be_taken_apart_are_refused():
    cfg, mesh = config(), mesh_of(dp=dist.get_world_size())
    name = "model.layers.0.mlp.experts.gate_and_up_projs"
    try:
        ours(cfg).to_hf({name: distribute(reference(cfg)[name], mesh, (Shard(2),))})
    except LayoutError as error:
        assert "side by side" in str(error)
    else:
        raise AssertionError("gate and up, sharded across each other")
    down = "model.layers.0.mlp.experts.down_projs"
    hf = ours(cfg).to_hf({down: distribute(reference(cfg)[down], mesh, (Shard(2),))})
    want = ours(cfg).to_hf({down: reference(cfg)[down]})
    assert all(tensor.placements == (Shard(0),) and torch.equal(whole(tensor), want[key]) for key, tensor in hf.items())


# ---- destinations of a loader


def write(destinations, source):
    """What a loader does: fills this rank's part of every destination, in place."""
    for key, tensor in destinations.items():
        if isinstance(tensor, DTensor):
            tensor.to_local().copy_(piece(source[key], tensor.device_mesh, tensor.placements))
        else:
            tensor.copy_(source[key])


@scenario
def an_fp8_checkpoint_is_loaded_into_destinations():
    cfg = config(num_local_experts=4)
    half = dist.get_world_size() // 2
    for dims, placements in (
        ({"ep": 2 * half}, (Shard(0),)),
        ({"ep_shard": 2, "ep": half}, (Shard(1), Shard(0))),
    ):
        mesh = mesh_of(**dims)
        model = native_dtensors(cfg, mesh, placements, (Replicate(),) * len(placements))
        how = {"exclude_key_regex": ".*_extra_state.*", "device_mesh": mesh, "for_checkpoint_load": True}
        destinations = ours(cfg).to_hf(model, quantization=True, **how)
        nemo = nemo_adapter(cfg).to_hf(dict(model), quantization=True, **how)
        assert list(destinations) == list(nemo)
        for key, tensor in destinations.items():
            assert type(tensor) is type(nemo[key]) and tensor.shape == nemo[key].shape, key
            assert tensor.dtype == nemo[key].dtype
            assert getattr(tensor, "placements", None) == getattr(nemo[key], "placements", None), key
        write(destinations, checkpoint(cfg))
        assert_pieces_of(ours(cfg).from_hf(destinations, device_mesh=mesh), cfg, mesh, placements)


@scenario
def a_float_checkpoint_is_loaded_into_the_model_itself():
    cfg = config(num_local_experts=4)
    half = dist.get_world_size() // 2
    hf = ours(cfg).to_hf(reference(cfg))
    for dims, placements, mesh_for_experts in (
        ({"ep": 2 * half}, (Shard(0),), True),
        ({"dp": 2 * half}, (Shard(0),), False),
        ({"ep_shard": 2, "ep": half}, (Shard(1), Shard(0)), True),
    ):
        mesh = mesh_of(**dims)
        model = native_dtensors(cfg, mesh, placements, (Replicate(),) * len(placements))
        for tensor in model.values():
            if isinstance(tensor, DTensor):
                tensor.to_local().zero_()
        destinations = ours(cfg).to_hf(model, for_checkpoint_load=True)
        write(destinations, hf)
        native = ours(cfg).from_hf(destinations, mesh if mesh_for_experts else None)
        assert native.keys() == model.keys()
        for name, tensor in native.items():
            assert_same(whole(tensor), reference(cfg)[name])
            assert len(placements) > 1 or tensor is model[name], name


# ---- LoRA of experts


@scenario
def lora_of_experts_as_dtensors():
    half, nemo = dist.get_world_size() // 2, nemo_adapter(LORA_CFG)
    factors = nemo.from_hf(in_torch(random_lora(NEMO, cfg=LORA_CFG)))
    wrapped = nemo.to_hf(dict(factors))
    per_expert = nemo.to_hf(dict(factors), v4_compatible=True)
    for dims, placements in (({"ep": 2 * half}, (Shard(0),)), ({"ep_shard": 2, "ep": half}, (Shard(1), Shard(0)))):
        mesh = mesh_of(**dims)
        native = {name: distribute(tensor, mesh, placements) for name, tensor in factors.items()}
        assert differences(ours(LORA_CFG).to_hf(native), wrapped) == []
        got = ours(LORA_CFG).to_hf(native, v4_compatible=True)
        mine = piece(torch.arange(LORA_CFG.num_local_experts), mesh["ep"], (Shard(0),)).tolist()
        assert {int(key.split("experts.")[1].split(".")[0]) for key in got} == set(mine)
        assert differences(got, {key: per_expert[key] for key in got}) == []
        assert differences(ours(LORA_CFG).from_hf(dict(wrapped), mesh), nemo.from_hf(dict(wrapped), mesh)) == []
        spread = {key: distribute(tensor, mesh, (Shard(0), REPLICATE)[: mesh.ndim]) for key, tensor in wrapped.items()}
        assert differences(ours(LORA_CFG).from_hf(spread), factors) == []
