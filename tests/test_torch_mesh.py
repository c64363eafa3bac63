import from_hf_ranks
import numpy as np
import pytest
import ranks
import to_hf_ranks
import torch
from fp8_cases import BLOCK, MINIMAX, random_matrix
from helpers import config
from hypothesis import given, settings
from hypothesis import strategies as st
from nemo_oracle import assert_same, checkpoint, nemo_adapter, our_adapter
from rank_tensors import distribute, piece, rank_of
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard

from minimax_jax.errors import LayoutError
from torch_bridge import fp8, matrices
from torch_bridge.arrays import as_numpy, to_jax, to_torch
from torch_bridge.mesh import experts_layout, layout_of, region_of

WORLDS = (2, 4)
SCENARIOS = ranks.scenarios(from_hf_ranks, to_hf_ranks)


@pytest.fixture(scope="module")
def outcomes():
    return {world: ranks.run(world, SCENARIOS) for world in WORLDS}


@pytest.mark.parametrize("name", SCENARIOS)
@pytest.mark.parametrize("world", WORLDS)
def test_in_several_processes(outcomes, world, name):
    assert outcomes[world][name] == [""] * world


@st.composite
def shards(draw):
    """Dimensions of a mesh of 2 to 64 ranks, placements on it, and one of its ranks."""
    sizes = draw(st.sampled_from([(ranks,) for ranks in range(2, 65)] + [(a, b) for a in (2, 3, 8) for b in (1, 2, 8)]))
    placements = draw(st.tuples(*(st.sampled_from([Shard(0), Shard(1), Replicate()]) for _ in sizes)))
    return sizes, placements, draw(st.integers(0, torch.Size(sizes).numel() - 1))


@settings(max_examples=60, deadline=None)
@given(shape=st.sampled_from(MINIMAX), shard=shards(), seed=st.integers(0, 2**32 - 1))
def test_any_shard_of_any_mesh_is_dequantised_as_in_one_piece(shape, shard, seed):
    sizes, placements, rank = shard
    codes, scales = (to_torch(array) for array in random_matrix(np.random.default_rng(seed), shape, BLOCK))
    want = fp8.dequantize_torch(codes, scales, torch.bfloat16, block=BLOCK)
    with rank_of(rank, **dict(zip("abc", sizes, strict=False))) as mesh:
        weight = distribute(codes, mesh, placements)
        got = matrices.dequantize(weight, scales, torch.bfloat16, block=BLOCK)
        assert (got.placements, got.device_mesh, got.shape) == (placements, mesh, want.shape)
        assert_same(got.to_local(), piece(want, mesh, placements))


@pytest.mark.parametrize("kernels", ["numba", "xla"])
@pytest.mark.parametrize("hidden", [512, 320])  # a half is whole blocks, or is not
def test_halves_of_experts_in_all_ways_on_cpu(monkeypatch, kernels, hidden):
    monkeypatch.setenv("MINIMAX_JAX_CPU", kernels)
    cfg = config(hidden_size=hidden, intermediate_size=256, num_hidden_layers=1, num_local_experts=2)
    want = nemo_adapter(cfg).from_hf(checkpoint(cfg))
    for rank in range(4):
        with rank_of(rank, ep_shard=2, ep=2) as mesh:
            for name, tensor in our_adapter(cfg).from_hf(checkpoint(cfg), mesh).items():
                if isinstance(tensor, DTensor):
                    assert_same(tensor.to_local(), piece(want[name], mesh, tensor.placements))


@pytest.mark.parametrize("experts", [1, 3, 4, 7, 64])
@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_experts_are_shared_out_as_the_parameters_they_load_into(experts, ranks):
    parameter = torch.arange(experts)[:, None, None].expand(experts, 6, 8)
    for rank in range(ranks):
        with rank_of(rank, ep=ranks) as mesh:
            layout = experts_layout(mesh)
            mine = layout.region(parameter.shape)[0]
            assert list(mine) == piece(parameter, mesh, layout.placements)[:, 0, 0].tolist()


def test_a_rank_outside_the_mesh_is_an_error():
    with rank_of(3, ep=4) as mesh:
        other = torch.distributed.device_mesh.DeviceMesh("cpu", [0, 1], mesh_dim_names=("ep",))
        assert mesh.get_local_rank() == 3
        with pytest.raises(LayoutError, match="not in the mesh"):
            experts_layout(other).region((4, 4, 4))


@pytest.mark.parametrize("placement", [Partial(), _StridedShard(0, split_factor=2)])
def test_a_layout_that_is_no_rectangle_is_an_error(placement):
    with rank_of(0, dp=2) as mesh:
        tensor = DTensor.from_local(torch.zeros(4, 4), mesh, [placement])
        with pytest.raises(LayoutError, match="unsupported placement"):
            layout_of(tensor)


def test_a_local_part_that_is_not_the_chunk_is_an_error():
    with rank_of(0, dp=4) as mesh:  # 5 rows over 4 ranks are chunks of 2, 2, 1, 0
        tensor = DTensor.from_local(torch.zeros(1, 4), mesh, [Shard(0)], shape=torch.Size([5, 4]), stride=(4, 1))
        with pytest.raises(LayoutError, match="not the chunk"):
            region_of(tensor)


def test_a_dtensor_does_not_cross_to_jax():
    with rank_of(0, dp=2) as mesh:
        tensor = DTensor.from_local(torch.zeros(4, 4), mesh, [Shard(0)])
        for cross in (to_jax, as_numpy):
            with pytest.raises(LayoutError, match="DTensor"):
                cross(tensor)


def test_meshes_that_are_not_of_experts_are_refused():
    with rank_of(0, dp=2) as mesh, pytest.raises(LayoutError, match="not a mesh of experts"):
        experts_layout(mesh)
