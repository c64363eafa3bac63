import copy

import helpers
import jax.numpy as jnp
import pytest
from hypothesis import given
from hypothesis import strategies as st

import minimax_jax as mj
from minimax_jax.errors import LayoutError

STEPS = st.text("ab1", min_size=1, max_size=2)
NAMES = st.lists(STEPS, min_size=1, max_size=4).map(".".join)
TREES = st.recursive(st.integers(), lambda inner: st.dictionaries(STEPS, inner, min_size=1, max_size=3), max_leaves=12)


def test_names_become_paths():
    assert mj.nest({"a.b.c": 1, "a.d": 2, "e": 3}) == {"a": {"b": {"c": 1}, "d": 2}, "e": 3}
    assert mj.flatten({"a": {"b": {"c": 1}, "d": 2}, "e": 3}) == {"a.b.c": 1, "a.d": 2, "e": 3}
    assert mj.nest({}) == mj.flatten({}) == {}


def test_native_trees_go_there_and_back_with_their_own_leaves():
    cfg = helpers.config(hidden_size=40, intermediate_size=24, num_hidden_layers=2)
    native = mj.from_hf(helpers.random_hf(cfg), cfg, dtype=None)
    nested = mj.nest(native)
    experts = nested["model"]["layers"]["1"]["mlp"]["experts"]
    assert isinstance(experts["down_projs"], mj.BlockScaled)
    assert experts["down_projs"] is native["model.layers.1.mlp.experts.down_projs"]
    back = mj.flatten(nested)
    assert back.keys() == native.keys()
    assert all(back[name] is native[name] for name in native)


@given(TREES.filter(lambda tree: isinstance(tree, dict)))
def test_nest_undoes_flatten(nested):
    before = copy.deepcopy(nested)
    assert mj.nest(mj.flatten(nested)) == nested == before


@given(st.dictionaries(NAMES, st.integers(), max_size=6))
def test_flatten_undoes_nest_or_nest_names_every_name_in_the_way(flat):
    in_the_way = {name for name in flat if any(other.startswith(name + ".") for other in flat)}
    if not in_the_way:
        assert mj.flatten(mj.nest(flat)) == flat
        return
    with pytest.raises(LayoutError, match="another name passes through") as error:
        mj.nest(flat)
    assert {problem.key for problem in error.value.problems} == in_the_way


@pytest.mark.parametrize("names", [("a", "a.b"), ("a.b", "a")])
def test_a_name_in_the_way_is_refused_in_either_order(names):
    with pytest.raises(LayoutError) as error:
        mj.nest({name: jnp.zeros(1) for name in names})
    assert [problem.key for problem in error.value.problems] == ["a"]


def test_a_dict_is_no_leaf():
    inner = {"b": 1}
    with pytest.raises(LayoutError, match="a leaf is a dict"):
        mj.nest({"a": inner, "c.d": 2})
    assert inner == {"b": 1}


def test_two_leaves_of_one_name_are_refused():
    with pytest.raises(LayoutError, match="two leaves of one name") as error:
        mj.flatten({"a": {"b": 1, "c": 2}, "a.b": 3, "a.c": 4})
    assert [problem.key for problem in error.value.problems] == ["a.b", "a.c"]


def test_steps_that_are_no_text_become_text():
    assert mj.flatten({"layers": {0: 1, 1: 2}, 3: 4}) == {"layers.0": 1, "layers.1": 2, "3": 4}
