"""Scenarios for several processes over gloo: each function is run by every rank and raises if anything is wrong."""

import functools
import multiprocessing
import os
import socket
import traceback

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import torch
import torch.distributed as dist
from helpers import config as config_of
from lora_cases import CFG as LORA_CFG
from lora_cases import NEMO, random_lora
from nemo_oracle import assert_same, create_dtensor_from_local, differences, nemo_adapter
from nemo_oracle import checkpoint as random_checkpoint
from nemo_oracle import our_adapter as ours
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch_helpers import in_torch

from minimax_jax.errors import LayoutError, NumericError

REPLICATE = Replicate()
_SECONDS = 120


def run(world):
    """Run every scenario in `world` processes; gives by name what each rank says of it: nothing if all is well."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch_ranks"])
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    queue = context.SimpleQueue()
    ranks = [context.Process(target=_rank, args=(rank, world, port, queue)) for rank in range(world)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(_SECONDS)
        process.kill()
    said = {name: ["was not reached"] * world for name in SCENARIOS}
    while not queue.empty():
        name, rank, text = queue.get()
        said[name][rank] = text
    return said


def _rank(rank, world, port, queue):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
    for name, function in SCENARIOS.items():
        try:
            function()
        except Exception:
            queue.put((name, rank, traceback.format_exc()))
            break  # the other ranks may be waiting for this one in a collective: no later one would match
        queue.put((name, rank, ""))
    dist.destroy_process_group()


SCENARIOS = {}


def scenario(function):
    SCENARIOS[function.__name__] = function
    return function


# ---- what everything is compared with: one process


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


# ---- to Hugging Face


def native_dtensors(cfg, mesh, experts, others=(REPLICATE,)):
    return {
        name: distribute(tensor, mesh, experts if is_expert(name) else others) if tensor.ndim > 1 else tensor
        for name, tensor in reference(cfg).items()
    }


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
