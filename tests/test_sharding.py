import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import bits, config, dequantize, differences, random_hf
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AbstractMesh, AxisType
from jax.sharding import PartitionSpec as P

import minimax_jax as mj
from minimax_jax.errors import JobError
from minimax_jax.models.sharding import Rules, partition_specs, shardings
from minimax_jax.models.weights import abstract_weights
from minimax_jax.synthetic import REAL

LAYER = "model.layers.1."
EXPERTS = LAYER + "mlp.experts."
SMALL = config(num_local_experts=8, num_attention_heads=8, num_key_value_heads=4, head_dim=32, rotary_dim=16)
NO_RULES = Rules(**dict.fromkeys(field.name for field in dataclasses.fields(Rules)))


def mesh_of(**axes):
    return jax.make_mesh(tuple(axes.values()), tuple(axes), axis_types=(AxisType.Auto,) * len(axes))


def of_rank(spec, rank):
    """A spec with every axis told, as tuples."""
    axes = [(axis,) if isinstance(axis, str) else tuple(axis or ()) for axis in spec]
    return axes + [()] * (rank - len(axes))


def problems(cfg, mesh_shape, **rules):
    with pytest.raises(JobError) as caught:
        partition_specs(cfg, mesh_shape, rules=Rules(**rules))
    return caught.value.problems


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("scaled", ["BF16", "F8_E4M3"])
def test_the_tree_has_the_form_of_the_weights_and_every_axis_divides(scaled, stacked):
    mesh = AbstractMesh((4, 8, 2), ("expert", "tensor", "fsdp"))
    found = shardings(REAL, mesh, scaled=scaled, stacked=stacked)
    like = abstract_weights(REAL, scaled=scaled, stacked=stacked)
    assert jax.tree.structure(found) == jax.tree.structure(like)
    shapes = jax.tree.map(lambda leaf, own: own.shard_shape(leaf.shape), like, found)
    name = "model.layers.mlp.experts.down_projs" if stacked else EXPERTS + "down_projs"
    lead = (62,) if stacked else ()
    down = shapes[name].values if scaled == "F8_E4M3" else shapes[name]
    assert down == (*lead, 8, 1536, 1536)


def test_default_rules():
    specs = partition_specs(REAL, {"expert": 2, "tensor": 4, "fsdp": 2})
    assert {name.removeprefix(LAYER): spec for name, spec in specs.items() if "layers.1." in name} == {
        "input_layernorm.weight": P(None),
        "self_attn.q_proj.weight": P("tensor", "fsdp"),
        "self_attn.k_proj.weight": P("tensor", "fsdp"),
        "self_attn.v_proj.weight": P("tensor", "fsdp"),
        "self_attn.o_proj.weight": P("fsdp", "tensor"),
        "self_attn.q_norm.weight": P("tensor"),
        "self_attn.k_norm.weight": P("tensor"),
        "post_attention_layernorm.weight": P(None),
        "mlp.gate.weight": P(None, None),
        "mlp.gate.e_score_correction_bias": P(None),
        "mlp.experts.gate_and_up_projs": P(("expert", "tensor"), "fsdp", None),
        "mlp.experts.down_projs": P(("expert", "tensor"), None, "fsdp"),
    }
    assert specs["model.embed_tokens.weight"] == specs["lm_head.weight"] == P("tensor", "fsdp")
    assert specs["model.norm.weight"] == P(None)


def test_a_mesh_needs_none_of_the_usual_axes():
    specs = partition_specs(REAL, {"data": 3})
    assert all(axis is None for spec in specs.values() for axis in spec)


def test_names_of_mesh_axes_are_free():
    rules = Rules(expert="x", inter=("y", "z"), hidden=None, router="z", norm="y", vocab=("z", "x"))
    specs = partition_specs(REAL, {"x": 2, "y": 3, "z": 2}, rules=rules)
    assert specs[EXPERTS + "gate_and_up_projs"] == P("x", None, ("y", "z"))
    assert specs[EXPERTS + "down_projs"] == P("x", ("y", "z"), None)
    assert specs[LAYER + "mlp.gate.weight"] == P("z", "y")
    assert specs[LAYER + "mlp.gate.e_score_correction_bias"] == P("z")
    assert specs[LAYER + "input_layernorm.weight"] == P("y")
    assert specs["lm_head.weight"] == P(("z", "x"), None)


def test_a_tied_head_is_left_out():
    assert "lm_head.weight" not in partition_specs(REAL.replace(tie_word_embeddings=True), {"tensor": 2})


# ---- heads


@pytest.mark.parametrize(("shards", "axis"), [(4, "tensor"), (8, "tensor"), (16, None)])
def test_keys_and_values_stay_whole_where_there_are_more_shards_than_heads(shards, axis):
    specs = partition_specs(REAL, {"tensor": shards}, scaled="F8_E4M3")
    for name in ("k_proj", "v_proj"):
        leaf = specs[f"{LAYER}self_attn.{name}.weight"]
        assert of_rank(leaf.values, 2)[0] == of_rank(leaf.scale_inv, 2)[0] == ((axis,) if axis else ())
    assert specs[LAYER + "self_attn.k_norm.weight"] == P(axis)
    assert of_rank(specs[LAYER + "self_attn.q_proj.weight"].values, 2)[0] == ("tensor",)


def test_heads_are_not_cut_even_where_their_size_divides():
    cfg = config(num_attention_heads=12, num_key_value_heads=6, head_dim=64)
    found = problems(cfg, {"tensor": 4}, vocab=None, expert=None)
    names = {f"model.layers.self_attn.{name}.weight" for name in ("k_proj", "v_proj", "k_norm")}
    assert {problem.key for problem in found} == names
    assert {(problem.expected, problem.got) for problem in found} == {("a multiple of 4 (tensor=4)", "6 heads")}
    assert all("heads stay whole" in problem.what and "kv_heads=None" in problem.remedy for problem in found)


# ---- what cannot be


def test_a_mesh_axis_used_twice_in_a_tensor():
    found = problems(REAL, {"expert": 4, "fsdp": 2}, hidden=("fsdp", "expert"), vocab="fsdp")
    names = ["model.embed_tokens.weight", "lm_head.weight"]
    names += [f"model.layers.mlp.experts.{name}" for name in ("gate_and_up_projs", "down_projs")]
    assert sorted(problem.key for problem in found) == sorted(names)
    by_key = {problem.key: problem for problem in found}
    assert "expert" in by_key[names[2]].what
    assert by_key[names[2]].got == "expert over ('expert',), hidden over ('fsdp', 'expert')"
    assert all("Rules" in problem.remedy for problem in found)


def test_a_mesh_axis_used_twice_in_one_rule():
    (found,) = {problem.what for problem in problems(REAL, {"expert": 4}, expert=("expert", "expert"))}
    assert found == "mesh axis used twice: expert"


def test_axes_that_do_not_divide_are_told_all_at_once():
    found = problems(SMALL, {"expert": 3, "tensor": 7}, kv_heads=None, q_heads=None)
    assert {(problem.key, problem.expected, problem.got) for problem in found} == {
        ("model.embed_tokens.weight", "a multiple of 7 (tensor=7)", "size 30"),
        ("lm_head.weight", "a multiple of 7 (tensor=7)", "size 30"),
        ("model.layers.mlp.experts.gate_and_up_projs", "a multiple of 21 (expert=3 x tensor=7)", "size 8"),
        ("model.layers.mlp.experts.down_projs", "a multiple of 21 (expert=3 x tensor=7)", "size 8"),
    }


def test_mesh_axes_that_the_mesh_lacks():
    found = problems(REAL, {"tensor": 5}, hidden="fsdb", kv_heads=("tensor", "b"))
    told = [(problem.what, problem.got) for problem in found]
    assert told[0] == ("no such mesh axis, in the rule of hidden", "fsdb")
    assert told[1] == ("no such mesh axis, in the rule of kv_heads", "b")
    assert any("does not divide" in what for what, _ in told)


# ---- scales


@pytest.mark.parametrize(
    ("hidden", "inter", "gate_up", "down"),
    [
        (512, 256, [(), ("a",), ("b",)], [(), ("b",), ("a",)]),  # every shard is whole blocks
        (384, 256, [(), (), ("b",)], [(), ("b",), ()]),  # 192 of 384 rows are not
        (
            512,
            128,
            [(), ("a",), ("b",)],
            [(), (), ("a",)],
        ),  # half of gate and up is gate, whole blocks; not half of down
        (512, 192, [(), ("a",), ()], [(), (), ("a",)]),  # gate itself is not whole blocks
    ],
)
def test_scales_are_split_as_the_codes_where_shards_are_whole_blocks(hidden, inter, gate_up, down):
    cfg = config(hidden_size=hidden, intermediate_size=inter, num_local_experts=8)
    rules = dataclasses.replace(NO_RULES, hidden="a", inter="b")
    specs = partition_specs(cfg, {"a": 2, "b": 2}, rules=rules, scaled="F8_E4M3")
    assert of_rank(specs[EXPERTS + "gate_and_up_projs"].values, 3) == [(), ("a",), ("b",)]
    assert of_rank(specs[EXPERTS + "gate_and_up_projs"].scale_inv, 3) == gate_up
    assert of_rank(specs[EXPERTS + "down_projs"].scale_inv, 3) == down


@settings(deadline=None, max_examples=60)
@given(
    hidden=st.sampled_from([128, 192, 256, 320, 512]),
    inter=st.sampled_from([64, 128, 192, 256]),
    a=st.sampled_from([1, 2, 4]),
    b=st.sampled_from([1, 2, 4]),
)
def test_split_scales_are_those_of_the_device_own_codes(hidden, inter, a, b):
    cfg = config(hidden_size=hidden, intermediate_size=inter, num_local_experts=4)
    rules = dataclasses.replace(NO_RULES, hidden="a", inter="b")
    specs = partition_specs(cfg, {"a": a, "b": b}, rules=rules, scaled="F8_E4M3")
    leaves = {name: leaf for name, leaf in specs.items() if isinstance(leaf, mj.BlockScaled)}
    for name, leaf in leaves.items():
        entry = mj.specs(cfg).by_native[name]
        codes, scales = (of_rank(spec, len(entry.shape)) for spec in (leaf.values, leaf.scale_inv))
        for axis, block in ((-2, leaf.block[0]), (-1, leaf.block[1])):
            if scales[axis]:
                shards = {"a": a, "b": b}[codes[axis][0]]
                assert scales[axis] == codes[axis]
                assert entry.shape[axis] // shards == entry.grid[axis] // shards * block


def test_a_tree_goes_where_the_shardings_say():
    hf = random_hf(SMALL)
    mesh = mesh_of(expert=2, tensor=2, fsdp=2)
    tree = mj.from_hf(hf, SMALL, dtype=None)
    placed = jax.device_put(tree, shardings(SMALL, mesh, scaled="F8_E4M3"))
    gate_up = placed[LAYER + "mlp.experts.gate_and_up_projs"]
    assert gate_up.values.sharding.shard_shape(gate_up.values.shape) == (2, 160, 384)
    made = jax.jit(lambda tree: mj.from_hf(tree, SMALL), out_shardings=shardings(SMALL, mesh))(hf)
    want = mj.from_hf(hf, SMALL, dtype=jnp.bfloat16)
    assert differences(made, want) == []
    shard = made[LAYER + "self_attn.q_proj.weight"].addressable_shards[-1]
    key = LAYER + "self_attn.q_proj.weight"
    whole = dequantize(hf[key], hf[key + "_scale_inv"], jnp.bfloat16)
    assert shard.data.shape == (128, 160)
    np.testing.assert_array_equal(bits(shard.data), bits(whole[shard.index]))
