"""Orbax checkpoints read onto meshes, and saved from them."""

import jax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from orbax_cases import BIAS, GATE_UP, SUFFIX, assert_same, expected, mesh

import minimax_jax as mj
from minimax_jax.errors import LayoutError
from minimax_jax.jobs.orbax import read, save
from minimax_jax.ops.scaled import BlockScaled

# ---- shardings


def sharded(tree, over, *, rows=None, cols=None):
    """A sharding for each leaf: grouped ones over both axes of a mesh, all else over none."""

    def of(leaf):
        grouped = len(leaf.shape) == 3
        return NamedSharding(over, P(rows, None, cols) if grouped else P())

    def both(leaf):
        if not isinstance(leaf, BlockScaled):
            return of(leaf)
        scales = NamedSharding(over, P(rows) if leaf.ndim == 3 else P())
        return BlockScaled.tree_unflatten((leaf.block, leaf.parts), (of(leaf), scales))

    return {key: both(leaf) for key, leaf in tree.items()}


@pytest.mark.parametrize("dtype", ["BF16", "F8_E4M3"])
@pytest.mark.parametrize("sizes", [(8, 1), (2, 4)])
def test_it_is_read_onto_a_mesh(orbax_source, orbax_written, dtype, sizes):
    want = expected(orbax_source, dtype)
    shardings = sharded(want, mesh(*sizes), rows="expert", cols="fsdp")
    got = read(orbax_written / dtype, shardings=shardings)
    assert_same(got, want)
    for leaf, own in zip(jax.tree.leaves(got), jax.tree.leaves(shardings), strict=True):
        assert leaf.sharding == own
    shape = jax.tree.leaves(got[GATE_UP])[0].addressable_shards[0].data.shape
    assert shape == (8 // sizes[0], 256, 144 // sizes[1])


def test_one_sharding_serves_all(orbax_source, orbax_written):
    everywhere = NamedSharding(mesh(4, 2), P())
    got = read(orbax_written / "F8_E4M3", shardings=everywhere)
    assert all(leaf.sharding == everywhere for leaf in jax.tree.leaves(got))
    assert_same(got, expected(orbax_source, "F8_E4M3"))


@pytest.mark.parametrize("dtype", ["BF16", "F8_E4M3"])
def test_a_tree_saved_from_one_mesh_is_read_onto_another(orbax_source, dtype, tmp_path):
    config, want = mj.MiniMaxConfig.from_pretrained(orbax_source), expected(orbax_source, dtype)
    placed = jax.device_put(want, sharded(want, mesh(4, 2), rows="expert", cols="fsdp"))
    save(placed, config, tmp_path / "out")
    onto = sharded(want, mesh(2, 4), rows="fsdp")
    got = read(tmp_path / "out", shardings=onto)
    assert_same(got, want)
    assert jax.tree.leaves(got[GATE_UP])[0].addressable_shards[0].data.shape[0] == 2
    assert_same(read(tmp_path / "out"), want)
    held = mj.verify(tmp_path / "out", orbax_source).comparisons
    assert {found.relation for found in held} == ({"identical"} if dtype == "F8_E4M3" else {"identical", "equal"})


def test_shardings_that_are_missing_or_do_not_fit_are_told_at_once(orbax_source, orbax_written):
    over = mesh(8, 1)
    shardings = sharded(expected(orbax_source, "F8_E4M3"), over)
    del shardings[BIAS]
    shardings[GATE_UP] = NamedSharding(over, P())  # and none for its scales
    shardings["model.norm.weight"] = NamedSharding(over, P(None, "expert"))
    with pytest.raises(LayoutError) as caught:
        read(orbax_written / "F8_E4M3", shardings=shardings)
    found = {problem.key: problem.what for problem in caught.value.problems}
    missing, wrong = "no sharding is given", "sharding does not fit"
    assert found == {BIAS: missing, GATE_UP + SUFFIX: missing, "model.norm.weight": wrong}


# ---- as a source like any other


def test_it_is_loaded_onto_a_mesh(orbax_source, orbax_written):
    loaded = mj.load(orbax_written / "F8_E4M3", mesh=mesh(2, 2), dtype=None)
    assert_same(loaded, expected(orbax_source, "F8_E4M3"))
