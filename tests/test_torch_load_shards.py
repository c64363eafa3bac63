"""`load_into` on a mesh: each rank reads its own bytes alone, whatever its shards."""

import pytest
import ranks
import storage_ranks
import torch
from helpers import native_of
from nemo_oracle import assert_same, differences
from rank_tensors import distribute, piece, rank_of
from torch.distributed.tensor import Replicate, Shard
from torch_load_cases import ATTENTION, BF16, EXPERTS, blank
from torch_modules import count_reads, fused_of, module_of, poison, tensors_of

from minimax_jax.errors import LayoutError
from minimax_jax.io.checkpoint import open_checkpoint
from torch_bridge import load_into
from torch_bridge.mesh import experts_layout

WORLDS = (2, 4)
SCENARIOS = ranks.scenarios(storage_ranks, kind="load")


@pytest.mark.parametrize("form", ["native", "fused"])
@pytest.mark.parametrize("name", ["hf-fp8", "native-fp8", "native-bf16"])
@pytest.mark.parametrize("experts", [(Shard(0), Shard(1)), (Shard(2), Shard(1)), (Shard(1), Replicate())])
def test_any_shard_of_any_form(odd, torch_sources, name, form, experts):
    folder, hf = torch_sources
    want = tensors_of(native_of(hf, odd, BF16))
    want = fused_of(want) if form == "fused" else want
    for rank in range(4):
        with rank_of(rank, a=2, b=2) as mesh:

            def placements(tensor):
                return experts if tensor.ndim == 3 else (Shard(0), Shard(tensor.ndim - 1))

            sharded = {k: distribute(torch.full_like(t, float("nan")), mesh, placements(t)) for k, t in want.items()}
            module = module_of(sharded)
            load_into(module, folder / name)
            for key, tensor in module.state_dict().items():
                assert_same(tensor.to_local(), piece(want[key], mesh, placements(tensor)))


@pytest.mark.parametrize("dims", [{"ep": 4}, {"ep_shard": 2, "ep": 2}, {"ep_replicate": 2, "ep": 2}])
def test_plain_tensors_of_a_rank_on_a_mesh(odd, torch_sources, dims):
    folder, hf = torch_sources
    want = tensors_of(native_of(hf, odd, BF16))
    for rank in range(4):
        with rank_of(rank, **dims) as mesh:
            layout = experts_layout(mesh)
            mine = {k: piece(t, mesh[layout.mesh.mesh_dim_names], layout.placements) if t.ndim == 3 else t
                    for k, t in want.items()}  # fmt: skip
            module = module_of(blank(mine))
            load_into(module, folder / "hf-fp8", mesh)
            assert differences(module.state_dict(), mine) == []
            wrong = module_of(blank(mine | {EXPERTS + "down_projs": torch.zeros(1, 2, 3)}))
            with pytest.raises(LayoutError, match="another shape"):
                load_into(wrong, folder / "hf-fp8", mesh)


def test_a_rank_reads_its_experts_and_rows_alone(odd, torch_sources, monkeypatch):
    folder, hf = torch_sources
    infos = open_checkpoint(folder / "hf-fp8").tensors
    rows = (ATTENTION + "q_proj.weight", "lm_head.weight")
    want = tensors_of(native_of(hf, odd, BF16))
    every = set()
    for rank in range(2):
        with rank_of(rank, ep=2) as mesh, count_reads(monkeypatch) as reads:
            mine = {str(expert) for expert in (0, 1)} if rank == 0 else {"2", "3"}
            module = module_of({
                k: distribute(t, mesh, (Shard(0),)) if t.ndim == 3 or k in rows else t for k, t in want.items()
            })  # fmt: skip
            poison(module)
            loaded = load_into(module, folder / "hf-fp8")
        wanted = 0
        for key, info in infos.items():
            whole = ".experts." not in key or key.split(".")[5] in mine
            wanted += info.nbytes // 2 if key in rows else info.nbytes if whole else 0
        assert loaded.read_bytes == wanted == sum(stop - start for _, start, stop in reads)
        foreign = [i for k, i in infos.items() if ".experts." in k and k.split(".")[5] not in mine]
        assert not any(i.start < stop and start < i.stop for i in foreign for _, start, stop in reads)
        every |= set(reads)
    assert sum(stop - start for _, start, stop in every) == sum(info.nbytes for info in infos.values())


def test_a_native_checkpoint_is_read_by_ranges_too(odd, torch_sources, monkeypatch):
    folder, hf = torch_sources
    want = tensors_of(native_of(hf, odd, BF16))
    infos = open_checkpoint(folder / "native-bf16").tensors
    with rank_of(3, ep_shard=2, ep=2) as mesh:
        sharded = {k: distribute(t, mesh, (Shard(1), Shard(0))) if t.ndim == 3 else t for k, t in want.items()}
        module = poison(module_of(sharded))
        loaded = load_into(module, folder / "native-bf16")
        assert all(torch.equal(t.to_local(), piece(want[k], mesh, (Shard(1), Shard(0)))) for k, t in sharded.items()
                   if t.ndim == 3)  # fmt: skip
    assert loaded.read_bytes == sum(info.nbytes // (4 if len(info.shape) == 3 else 1) for info in infos.values())


@pytest.fixture(scope="module")
def outcomes(torch_sources, tmp_path_factory):
    folder, _ = torch_sources
    return {w: ranks.run(w, SCENARIOS, folder, tmp_path_factory.mktemp(f"load{w}")) for w in WORLDS}


@pytest.mark.parametrize("name", SCENARIOS)
@pytest.mark.parametrize("world", WORLDS)
def test_in_several_processes(outcomes, world, name):
    assert outcomes[world][name] == [""] * world
