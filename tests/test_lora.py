import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import BF16, F32, differences
from lora_cases import CFG, EXPERTS, HIDDEN, HUB, INTER, MANY, MLP, NEMO, PEFT, RANK, W1, keys_of, random_lora
from torch_helpers import in_numpy, in_torch, nemo_adapter

from minimax_jax.errors import LayoutError
from minimax_jax.lora import from_param_wrapper, group_lora, to_param_wrapper, ungroup_lora


def nemo_to_hf(grouped, cfg=CFG, **options):
    return in_numpy(nemo_adapter(cfg).to_hf(in_torch(grouped), **options))


def nemo_from_hf(tree, cfg=CFG):
    return in_numpy(nemo_adapter(cfg).from_hf(in_torch(tree)))


# --- beside NeMo ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_grouped_factors_equal_nemos(dtype):
    tree = random_lora(NEMO, dtype=dtype)
    grouped = group_lora(tree, CFG)
    assert not differences(grouped, nemo_from_hf(tree))
    assert grouped[PEFT + MLP + "lora_gate_and_up_B"].shape == (EXPERTS, RANK, 2 * INTER)


@pytest.mark.parametrize("prefix", ["", "model.", PEFT + "model."])
def test_per_expert_factors_equal_nemos(prefix):
    grouped = group_lora(random_lora(prefix=prefix), CFG)
    split = ungroup_lora(grouped, CFG, names="nemo")
    assert not differences(split, nemo_to_hf(grouped, v4_compatible=True))


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_wrapped_factors_equal_nemos(legacy, dtype):
    grouped = group_lora(random_lora(dtype=dtype), CFG)
    wrapped = to_param_wrapper(grouped, CFG, legacy=legacy)
    assert not differences(wrapped, nemo_to_hf(grouped, legacy_paramwrapper_layout=legacy))
    assert not differences(from_param_wrapper(wrapped, CFG), nemo_from_hf(wrapped))


# --- there and back -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
@pytest.mark.parametrize("kind", ["numpy", "jax"])
@pytest.mark.parametrize(("names", "spelled"), [("hub", HUB), ("nemo", NEMO)])
@pytest.mark.parametrize("concatenate", [False, True])
def test_per_expert_and_back(names, spelled, concatenate, kind, jit):
    tree = random_lora(spelled, shared=not concatenate)
    there = functools.partial(group_lora, config=CFG, concatenate=concatenate)
    back = functools.partial(ungroup_lora, config=CFG, names=names, concatenated=concatenate)
    if kind == "jax":
        tree = {key: jnp.asarray(array) for key, array in tree.items()}
    if jit:
        there, back = jax.jit(there), jax.jit(back)
    assert not differences(back(there(tree)), tree)


@pytest.mark.parametrize("legacy", [False, True])
def test_wrapped_and_back_the_layout_told_by_the_shapes(legacy):
    grouped = group_lora(random_lora(), CFG)
    assert not differences(from_param_wrapper(to_param_wrapper(grouped, CFG, legacy=legacy), CFG), grouped)
    down = {key: array for key, array in grouped.items() if "down" in key}
    assert not differences(from_param_wrapper(to_param_wrapper(down, CFG, legacy=legacy), CFG), down)


def test_more_experts_than_go_at_once():
    tree = random_lora(cfg=MANY, shared=False)
    grouped = group_lora(tree, MANY, concatenate=True)
    back = from_param_wrapper(to_param_wrapper(grouped, MANY), MANY)
    assert not differences(ungroup_lora(back, MANY, concatenated=True), tree)


def test_what_is_no_expert_lora_passes_through():
    others = {
        PEFT + "model.layers.0.self_attn.q_proj.lora_A.weight": np.ones((3, 16), F32),
        "model.layers.0.mlp.experts.down_projs": np.ones((4, 12, 16), F32),
        "lm_head.weight": np.ones((30, 16), F32),
        "anything": np.ones(1, F32),
    }
    tree = random_lora() | others
    grouped = group_lora(tree, CFG)
    wrapped = to_param_wrapper(grouped, CFG)
    for out in (grouped, wrapped, from_param_wrapper(wrapped, CFG), ungroup_lora(grouped, CFG)):
        assert all(out[key] is array for key, array in others.items())
    assert not differences(group_lora(wrapped, CFG), wrapped)
    assert not differences(from_param_wrapper(random_lora(), CFG), random_lora())


def test_inputs_are_left_alone():
    tree = random_lora()
    for array in tree.values():
        array.setflags(write=False)
    before = dict(tree)
    group_lora(tree, CFG)
    assert list(tree) == list(before) and all(tree[key] is before[key] for key in tree)


# --- an A each for gate and up --------------------------------------------------------------------------------------


def test_two_as_are_refused_by_name_not_dropped():
    tree = random_lora()
    changed = PEFT + "model.layers.1.block_sparse_moe.experts.2.w3.lora_A.weight"
    tree[changed] = tree[changed].copy()
    tree[changed][0, 0] = np.nextafter(tree[changed][0, 0], 9, dtype=F32)
    with pytest.raises(LayoutError, match="concatenate=True") as error:
        group_lora(tree, CFG)
    assert keys_of(error) == {changed}
    traced = jax.jit(lambda tree: group_lora(tree, CFG))(tree)
    poisoned = traced[PEFT + "model.layers.1.mlp.experts.lora_gate_and_up_A"]
    assert np.isnan(poisoned).all((1, 2)).tolist() == [False, False, True, False]
    assert not np.isnan(poisoned[jnp.array([0, 1, 3])]).any()


def test_nemo_drops_the_second_a_where_we_keep_it():
    tree = random_lora(NEMO, shared=False)
    up = {key: array for key, array in tree.items() if "up_proj.lora_A" in key}
    back = nemo_to_hf(nemo_from_hf(tree), v4_compatible=True)
    assert all(not np.array_equal(back[key], array) for key, array in up.items())
    ours = ungroup_lora(group_lora(tree, CFG, concatenate=True), CFG, names="nemo", concatenated=True)
    assert not differences(ours, tree)


def test_concatenated_factors_have_the_product_of_each():
    tree = random_lora(shared=False)
    grouped = group_lora(tree, CFG, concatenate=True)
    a, b = (np.asarray(grouped[f"{PEFT}{MLP}lora_gate_and_up_{side}"], np.float64) for side in "AB")
    assert a.shape == (EXPERTS, HIDDEN, 2 * RANK) and b.shape == (EXPERTS, 2 * RANK, 2 * INTER)
    for expert in range(EXPERTS):
        each = []
        for name in ("w1", "w3"):
            module = f"{PEFT}model.layers.0.block_sparse_moe.experts.{expert}.{name}.lora_"
            each.append((tree[module + "B.weight"].astype(np.float64) @ tree[module + "A.weight"]).T)
        np.testing.assert_allclose(a[expert] @ b[expert], np.concatenate(each, 1), rtol=1e-12)
    assert {array.shape[2 if key.endswith("A") else 1] for key, array in grouped.items()} == {2 * RANK}


@pytest.mark.parametrize("factor", ["lora_gate_and_up_B", "lora_down_A", "lora_down_B"])
def test_concatenated_factors_that_were_trained_are_not_cut(factor):
    grouped = {key: np.array(array) for key, array in group_lora(random_lora(), CFG, concatenate=True).items()}
    index = (2, 0, RANK) if factor.endswith("A") else (2, RANK, 0)
    grouped[PEFT + MLP + factor][index] = 1
    with pytest.raises(LayoutError, match="off the diagonal of expert 2") as error:
        ungroup_lora(grouped, CFG, concatenated=True)
    assert keys_of(error) == {PEFT + MLP + factor}
    shared = ungroup_lora(grouped, CFG)
    assert not differences(group_lora(shared, CFG), grouped)
    traced = jax.jit(lambda tree: ungroup_lora(tree, CFG, concatenated=True))(grouped)
    hurt = {key.split("experts.")[1][0] for key, array in traced.items() if np.isnan(array).any()}
    assert hurt == {"2"}


def test_an_odd_rank_was_not_concatenated():
    with pytest.raises(LayoutError, match="not concatenated"):
        ungroup_lora(group_lora(random_lora(), CFG), CFG, concatenated=True)


# --- what is refused ------------------------------------------------------------------------------------------------

W3_B = PEFT + "model.layers.1.block_sparse_moe.experts.3.w3.lora_B.weight"


def test_missing_factors_are_named():
    tree = random_lora()
    del tree[W1], tree[W3_B]
    with pytest.raises(LayoutError, match="missing tensor") as error:
        group_lora(tree, CFG)
    assert keys_of(error) == {W1, W3_B}


def test_an_a_without_its_b_only_if_partial():
    tree = {key: array for key, array in random_lora().items() if "lora_A" in key}
    with pytest.raises(LayoutError, match="missing tensor"):
        group_lora(tree, CFG)
    grouped = group_lora(tree, CFG, partial=True)
    assert not differences(ungroup_lora(grouped, CFG, partial=True), tree)
    wrapped = to_param_wrapper(grouped, CFG, partial=True)
    assert not differences(from_param_wrapper(wrapped, CFG, partial=True), grouped)


@pytest.mark.parametrize(
    "key",
    [
        PEFT + "model.layers.0.block_sparse_moe.experts.4.w1.lora_A.weight",
        PEFT + "model.layers.2.block_sparse_moe.experts.0.w1.lora_A.weight",
        PEFT + "model.layers.0.block_sparse_moe.experts.0.w4.lora_A.weight",
        PEFT + "model.layers.0.mlp.experts.0.w1.lora_A.weight",
        PEFT + "model.layers.0.block_sparse_moe.experts.0.w1.lora_A.default.weight",
        PEFT + "model.layers.0.mlp.experts.lora_up_A.lora_weight",
        PEFT + "model.layers.0.mlp.experts.0.lora_A.weight",
    ],
)
def test_expert_lora_of_no_known_name_is_refused(key):
    for convert in (group_lora, ungroup_lora, to_param_wrapper, from_param_wrapper):
        with pytest.raises(LayoutError, match="unexpected tensor") as error:
            convert({key: np.ones((3, 16), F32)}, CFG)
        assert keys_of(error) == {key}


def test_one_factor_under_two_names_is_refused():
    tree = random_lora() | random_lora(NEMO)
    with pytest.raises(LayoutError, match="given twice") as error:
        group_lora(tree, CFG)
    assert keys_of(error) == set(random_lora(NEMO))


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda a: a.T, "wrong shape"),
        (lambda a: a[:, :-1], "wrong shape"),
        (lambda a: a[:0], "wrong shape"),
        (lambda a: a[:2], "differ in rank"),
        (lambda a: a.astype(BF16), "wrong dtype"),
        (lambda a: a.astype(np.float64), "wrong dtype"),
    ],
)
def test_factors_that_do_not_fit_are_refused(change, what):
    tree = random_lora()
    tree[W1] = change(tree[W1])
    with pytest.raises(LayoutError, match=what):
        group_lora(tree, CFG)


def test_a_layout_that_the_shapes_cannot_tell_must_be_said():
    cfg = CFG.replace(hidden_size=2 * INTER)
    grouped = group_lora(random_lora(cfg=cfg), cfg)
    gate_up = {key: array for key, array in grouped.items() if "gate_and_up" in key}
    for legacy in (False, True):
        assert not differences(from_param_wrapper(to_param_wrapper(grouped, cfg, legacy=legacy), cfg), grouped)
        wrapped = to_param_wrapper(gate_up, cfg, legacy=legacy)
        with pytest.raises(LayoutError, match="say which PEFT wrote it"):
            from_param_wrapper(wrapped, cfg)
        assert not differences(from_param_wrapper(wrapped, cfg, legacy=legacy), gate_up)


def test_a_layout_that_the_shapes_contradict_is_refused():
    wrapped = to_param_wrapper(group_lora(random_lora(), CFG), CFG)
    with pytest.raises(LayoutError, match="wrong shape"):
        from_param_wrapper(wrapped, CFG, legacy=True)
    mixed = wrapped | to_param_wrapper(group_lora(random_lora(), CFG), CFG, legacy=True)
    mixed = mixed | {key: wrapped[key] for key in wrapped if "layers.0" in key}
    with pytest.raises(LayoutError, match="wrong shape"):
        from_param_wrapper(mixed, CFG)
