"""Scenarios of storage for several processes over gloo: each is run by every rank and raises if anything is wrong."""

import contextlib

import folders
import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as tdcp
from helpers import BF16, config, native_of, random_hf
from nemo_oracle import assert_same, differences
from plain_modules import fused_of, module_of
from rank_tensors import distribute, piece
from ranks import scenario
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard
from torch_modules import tensors_of

import minimax_jax as mj
from minimax_jax.errors import CheckpointError, JobError, LayoutError, NumericError, Problem
from minimax_jax.io import folder as folder_io
from minimax_jax.jobs.team import PeerFailed
from torch_bridge import dcp, load_into, save_hf
from torch_bridge import ranks as storage

CONFIG = config(num_local_experts=4)
"""320 hidden and 192 inter are no whole blocks, nor are their halves."""

ROWS = Shard(0)


def native(dtype=np.float32):
    """The tensors of one process, by plain numpy."""
    return tensors_of(native_of(random_hf(CONFIG), CONFIG, dtype))


def meshes():
    """Meshes of NeMo's expert dimensions, and how experts lie on them."""
    half = dist.get_world_size() // 2
    for dims, placements in (
        ({"ep": 2 * half}, (Shard(0),)),
        ({"ep_shard": 2, "ep": half}, (Shard(1), Shard(0))),
        ({"ep_replicate": 2, "ep": half}, (Replicate(), Shard(0))),
    ):
        yield init_device_mesh("cpu", tuple(dims.values()), mesh_dim_names=tuple(dims)), placements


def sharded(tensors, mesh, experts, others=ROWS):
    """DTensors: experts as given, matrices by `others` along the first dimension of the mesh, all else plain."""
    rest = (others, *[Replicate()] * (mesh.ndim - 1))
    return {
        name: distribute(tensor, mesh, experts if tensor.ndim == 3 else rest) if tensor.ndim > 1 else tensor
        for name, tensor in tensors.items()
    }


def blank(tensors):
    return {name: torch.full_like(tensor, float("nan")) for name, tensor in tensors.items()}


def assert_shards(module, want):
    for name, tensor in module.state_dict().items():
        local = tensor.to_local() if hasattr(tensor, "placements") else tensor
        whole = want[name]
        assert_same(local, piece(whole, tensor.device_mesh, tensor.placements) if tensor is not local else whole)


def refused(kind, text, function, *args, **kwargs):
    try:
        function(*args, **kwargs)
    except kind as error:
        assert text in str(error), error
    else:
        raise AssertionError(f"not refused: {text}")


# ---- loading


@scenario
def load_as_one_process_does(sources, _folder):
    for source, form in (("hf-fp8", native(np.float32)), ("native-bf16", fused_of(native(BF16)))):
        for mesh, experts in meshes():
            module = module_of(sharded(blank(form), mesh, experts))
            load_into(module, sources / source)
            assert_shards(module, form)


@scenario
def load_gathers_to_the_whole(sources, _folder):
    want = native()
    mesh, experts = next(meshes())
    module = module_of(sharded(blank(want), mesh, experts))
    load_into(module, sources / "hf-fp8", mesh)
    for name, tensor in module.state_dict().items():
        assert_same(tensor.full_tensor() if hasattr(tensor, "placements") else tensor, want[name])


# ---- saving


@scenario
def save_of_dtensors(_sources, folder):
    want = native()
    forms = ((want, Shard(0)), (fused_of(want), Shard(1)), (want, Replicate()))
    for number, ((mesh, experts), (tensors, others)) in enumerate(zip(meshes(), forms, strict=True)):
        path = folder / f"{number}"
        report = save_hf(module_of(sharded(tensors, mesh, experts, others)), path, config=CONFIG)
        assert report.destination == path and report.tensors == len(hf_of(want))
        assert differences(stored(path), hf_of(want)) == []
        dist.barrier()


@scenario
def save_as_fp8(_sources, folder):
    want = native()
    save_hf_alone(module_of(want), folder / "one", quantization=True)
    for number, (mesh, experts) in enumerate(meshes()):
        path = folder / f"fp8-{number}"
        report = save_hf(module_of(sharded(want, mesh, experts)), path, config=CONFIG, quantization=True)
        assert len(report.fresh_scales) == 32 and report.kept_scales == 0
        assert folders.stored(path) == folders.stored(folder / "one")


@scenario
def save_fails_on_every_rank(_sources, folder):
    mesh, experts = next(meshes())
    tensors = native()
    for name in ("model.layers.0.self_attn.q_proj.weight", "model.layers.1.mlp.experts.down_projs"):
        tensors[name][0, 0] = float("nan")
    module = module_of(sharded(tensors, mesh, experts))
    for _ in range(2):  # the ranks are in step afterwards
        with pytest.raises(NumericError) as caught:
            save_hf(module, folder / "nan", config=CONFIG, quantization=True)
        assert len(caught.value.problems) == 2 and not (folder / "nan").exists()
    refused(JobError, "not an empty folder", save_hf, module, folder / "one", config=CONFIG)


@scenario
def save_stopped_in_one_rank_ends_on_all(_sources, folder):
    mesh, experts = next(meshes())
    module = module_of(sharded(native(), mesh, experts))
    for victim in (0, dist.get_world_size() - 1):
        for number, error in enumerate((KeyboardInterrupt, OSError, LayoutError(Problem(what="not so")))):
            name = f"stopped-{victim}-{number}"
            with pytest.MonkeyPatch.context() as patch, pytest.raises(BaseException) as caught:
                stops_at(patch, 5, error if dist.get_rank() == victim else None)
                save_hf(module, folder / name, config=CONFIG)
            same = isinstance(error, LayoutError) or dist.get_rank() == victim
            expected = (error if isinstance(error, type) else type(error)) if same else PeerFailed
            assert caught.type is expected, (victim, error, caught.value)
            assert not (folder / name).exists()
            dist.barrier()
            assert not list(folder.glob(f".{name}*"))


@scenario
def dcp_stopped_in_the_writer_ends_on_all(_sources, folder):
    mesh, experts = next(meshes())
    tensors = sharded(native(), mesh, experts)
    for number, place in enumerate(("__enter__", "__exit__")):
        path = folder / f"halted-{number}"
        with pytest.MonkeyPatch.context() as patch, pytest.raises(BaseException) as caught:
            patch.setattr("torch_bridge.ranks.appearing", lambda path, place=place: halting(path, place))
            dcp.save(tensors, path, CONFIG)
        assert caught.type is (KeyboardInterrupt if dist.get_rank() == 0 else PeerFailed), caught.value
        assert not path.exists()
        dist.barrier()


@contextlib.contextmanager
def halting(path, place):
    """`appearing`, stopped before the folder is made or before it gets its name."""
    if place == "__enter__":
        raise KeyboardInterrupt
    with folder_io.appearing(path) as made:
        yield made
        raise KeyboardInterrupt


def stops_at(patch, count, error):
    """Have a rank fail at some piece, right after its part in fetching it."""
    gather, left = storage.gather, [count]

    def fails(home, box):
        piece = gather(home, box)
        left[0] -= 1
        if left[0] == 0 and error is not None:
            raise error
        return piece

    patch.setattr("torch_bridge.ranks.gather", fails)


def save_hf_alone(module, path, **how):
    """By rank 0 as if there were no other."""
    if dist.get_rank() == 0:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("torch_bridge.ranks.together", lambda: False)
            save_hf(module, path, config=CONFIG, **how)
    dist.barrier()


def stored(path):
    return tensors_of(folders.arrays(path))


def hf_of(tensors):
    """Hugging Face tensors of native ones, by plain torch."""
    hf = {}
    for name, tensor in tensors.items():
        if name.endswith(("gate_and_up_projs", "down_projs")):
            base = name.replace("mlp.", "block_sparse_moe.").rpartition(".")[0]
            parts = ("w1", "w3") if "gate_and_up" in name else ("w2",)
            for expert, matrix in enumerate(tensor):
                for part, half in zip(parts, matrix.chunk(len(parts), dim=1), strict=True):
                    hf[f"{base}.{expert}.{part}.weight"] = half.T.contiguous()
        else:
            key = name.replace("mlp.gate.e_score", "mlp.e_score").replace(".mlp.", ".block_sparse_moe.")
            hf[key] = tensor
    return hf


# ---- distributed checkpoints


@scenario
def dcp_round_trip(_sources, folder):
    want = native()
    for number, (mesh, experts) in enumerate(meshes()):
        path = folder / f"dcp{number}"
        dcp.save(sharded(want, mesh, experts), path, CONFIG)
        for other, placements in meshes():
            got = sharded(blank(want), other, placements, Shard(1))
            dcp.load(got, path)
            assert_shards(module_of(got), want)
        got = blank(want)
        tdcp.load(got, checkpoint_id=path)
        assert differences(got, want) == []
        assert differences(tensors_of(mj.read_tree(path)), want) == []


@scenario
def dcp_of_one_process_is_read_by_all(sources, _folder):
    want = native(BF16)
    for mesh, experts in meshes():
        got = sharded(blank(want), mesh, experts, Shard(1))
        tdcp.load(got, checkpoint_id=sources / "streamed")
        assert_shards(module_of(got), want)


@scenario
def dcp_failures_are_every_ranks(_sources, folder):
    want = native()
    refused(JobError, "not an empty folder", dcp.save, want, folder / "dcp0", CONFIG)
    del want["model.norm.weight"]
    refused(LayoutError, "nobody asked for", dcp.load, want, folder / "dcp0")
    refused(CheckpointError, "no checkpoint", dcp.load, want, folder / "nothing")
