"""The check of whole trees: numbers of layers and experts, layouts, parts of a tree, many problems at a time."""

from dataclasses import replace

import pytest
from check_cases import (
    CONFIG,
    GATE_AND_UP,
    LAYER,
    MOE,
    SCALE,
    W1,
    W2,
    W3,
    Q,
    Tensor,
    fault,
    hf,
    native,
    problems_of,
    told,
    without,
)

import minimax_jax as mj
from minimax_jax.layout.check import survey


def test_a_missing_layer():
    (problem,) = problems_of(without(hf(), ".layers.2."))
    assert told(problem) == (
        "the tensors do not fit num_hidden_layers of config.json", None, None, "5: 0 to 4", "0 to 1, 3 to 4"
    )  # fmt: skip
    assert problem.remedy == "fetch an incomplete download again, or correct num_hidden_layers"


def test_a_layer_past_the_last():
    extra = hf(config=CONFIG.replace(num_hidden_layers=6))
    (problem,) = problems_of(extra)
    first = next(key for key in extra if ".layers.5." in key)
    assert told(problem) == (
        "the tensors do not fit num_hidden_layers of config.json", "shard.safetensors", first, "5: 0 to 4", "0 to 5"
    )  # fmt: skip
    assert "MTP" in problem.remedy


def test_unknown_tensors_of_a_layer_past_the_last_belong_to_it():
    extra = {f"model.layers.{5 + module}.eh_proj.weight": Tensor("BF16", (40, 80)) for module in range(3)}
    (problem,) = problems_of(hf() | extra)
    assert (problem.key, problem.got) == ("model.layers.5.eh_proj.weight", "0 to 7")


@pytest.mark.parametrize("make", [hf, native])
def test_a_config_with_too_many_layers(make):
    (problem,) = problems_of(make(), CONFIG.replace(num_hidden_layers=40))
    assert (problem.expected, problem.got) == ("40: 0 to 39", "0 to 4")


def test_an_expert_past_the_last():
    extra = MOE + "experts.6.w1.weight"
    (problem,) = problems_of(hf() | {extra: Tensor("F8_E4M3", (24, 40))})
    assert told(problem) == (
        "the tensors do not fit num_local_experts of config.json", "shard.safetensors", extra, "6: 0 to 5", "0 to 6"
    )  # fmt: skip
    assert problem.remedy == "correct num_local_experts"


def test_a_config_with_too_few_experts():
    count, *others = problems_of(hf(), CONFIG.replace(num_local_experts=4))
    assert (count.expected, count.got) == ("4: 0 to 3", "0 to 5")
    assert {(problem.what, problem.expected) for problem in others} == {
        ("wrong shape, and 4 more of the kind", "[4, 40]"),
        ("wrong shape, and 4 more of the kind", "[4]"),
    }


def test_a_config_with_too_many_experts():
    count, *others = problems_of(hf(), CONFIG.replace(num_local_experts=8))
    assert (count.expected, count.got) == ("8: 0 to 7", "0 to 5")
    assert [problem.what for problem in others] == [
        "wrong shape, and 4 more of the kind",
        "wrong shape, and 4 more of the kind",
        "missing tensor, and 4 more of the kind",
        "missing tensor, and 4 more of the kind",
    ]


def test_an_expert_missing_in_one_layer_is_not_a_wrong_number_of_experts():
    problems = problems_of(without(hf(), MOE + "experts.4."))
    assert [told(problem) for problem in problems] == [
        fault("missing tensor", W1, "12 for model.layers.{layer}.mlp.experts.gate_and_up_projs", "10", file=None),
        fault("missing tensor", W2, "6 for model.layers.{layer}.mlp.experts.down_projs", "5", file=None),
    ]


# ---- layouts


@pytest.mark.parametrize(
    ("make", "layout", "found"), [(hf, "native", "hf"), (native, "hf", "native")]
)  # fmt: skip
def test_the_other_layout(make, layout, found):
    tensors = make()
    (problem,) = problems_of(tensors, layout=layout)
    assert problem.what == "the tensors have the names of the other layout"
    assert (problem.expected, problem.got) == (layout, found)
    assert problem.key in tensors and problem.key not in (native if make is hf else hf)()


def test_both_layouts_mixed():
    experts = {key: tensor for key, tensor in hf("BF16").items() if ".experts.4.w1." in key}
    (problem,) = problems_of(native() | experts)
    assert problem.what == "name of the other layout, and 4 more of the kind"
    assert problem.key in experts


def test_a_native_name_in_a_hugging_face_tree_makes_it_native():
    problems = problems_of(hf("BF16") | {GATE_AND_UP: Tensor("BF16", (6, 40, 48))})
    assert {problem.what.split(",")[0] for problem in problems} == {"missing tensor", "name of the other layout"}


# ---- partial trees


def test_absent_tensors_are_allowed_only_when_asked():
    some = {key: tensor for key, tensor in hf().items() if key.startswith(MOE)}
    assert set(survey(some, CONFIG, partial=True).dtypes) == {
        GATE_AND_UP,
        LAYER + "mlp.experts.down_projs",
        LAYER + "mlp.gate.weight",
        LAYER + "mlp.gate.e_score_correction_bias",
    }
    with pytest.raises(mj.LayoutError):
        survey(some, CONFIG)


def test_nothing_is_a_partial_tree_and_no_checkpoint():
    assert survey({}, CONFIG, partial=True).dtypes == {}
    assert [(problem.key, problem.got) for problem in problems_of({})] == [
        (None, "none"),
        ("model.embed_tokens.weight", "0"),
        ("model.norm.weight", "0"),
        ("lm_head.weight", "0"),
    ]


@pytest.mark.parametrize("lost", [W1, W3, W1 + SCALE])
def test_what_is_there_of_a_partial_tree_must_be_complete(lost):
    some = {key: tensor for key, tensor in hf().items() if key.startswith(MOE) and key != lost}
    assert problems_of(some, partial=True)


def test_scales_alone_are_no_partial_tree():
    what = [problem.what for problem in problems_of({Q + SCALE: Tensor("F32", (2, 3))}, partial=True)]
    assert what == ["missing tensor", "scales without their FP8 weight"]


def test_one_unknown_name_in_a_partial_tree():
    (problem,) = problems_of({"model.layers.0.mlp.experts.gate_up": Tensor("BF16", (6, 48, 40))}, partial=True)
    assert (problem.what, problem.key) == ("unexpected tensor", "model.layers.0.mlp.experts.gate_up")


# ---- many problems


def test_several_problems_at_once_are_all_told():
    changes = {
        Q: Tensor("F8_E4M3", (40, 24)),
        W1 + SCALE: Tensor("F16", (1, 1)),
        "model.norm.weight": Tensor("I8", (40,)),
        "model.surprise": Tensor("BF16", (1,)),
    }
    tensors = without(hf() | changes, "lm_head", ".layers.0.", W2 + SCALE)
    assert {(problem.what, problem.key) for problem in problems_of(tensors)} == {
        ("the tensors do not fit num_hidden_layers of config.json", None),
        ("wrong shape", Q),
        ("wrong dtype", W1 + SCALE),
        ("wrong grid of scales", W1 + SCALE),
        ("FP8 weight without its scales", W2),
        ("wrong dtype", "model.norm.weight"),
        ("missing tensor", "lm_head.weight"),
        ("unexpected tensor", "model.surprise"),
    }


@pytest.mark.parametrize(("layers", "whats"), [(3, ["wrong shape"] * 3), (4, ["wrong shape, and 3 more of the kind"])])
def test_many_problems_of_one_kind_are_told_as_one(layers, whats):
    changes = {f"model.layers.{n}.self_attn.q_norm.weight": Tensor("BF16", (7,)) for n in range(layers)}
    problems = problems_of(hf() | changes)
    assert [problem.what for problem in problems] == whats
    assert problems[0].key == "model.layers.0.self_attn.q_norm.weight"


def test_problems_that_differ_are_not_told_as_one():
    sizes = {0: 7, 1: 7, 2: 7, 3: 7, 4: 8}
    changes = {f"model.layers.{n}.self_attn.q_norm.weight": Tensor("BF16", (size,)) for n, size in sizes.items()}
    assert [(problem.what, problem.got) for problem in problems_of(hf() | changes)] == [
        ("wrong shape, and 3 more of the kind", "[7]"),
        ("wrong shape", "[8]"),
    ]


def test_a_wrong_size_in_config_is_told_in_a_few_lines():
    problems = problems_of(hf(), CONFIG.replace(hidden_size=48))
    assert len(problems) == 13
    assert len(str(mj.LayoutError(problems)).splitlines()) < 100


def test_every_expert_name_wrong_is_told_in_a_few_lines():
    names = {".w1.": ".gate_proj.", ".w2.": ".down_proj.", ".w3.": ".up_proj."}

    def renamed(key):
        for ours, theirs in names.items():
            key = key.replace(ours, theirs)
        return key

    problems = problems_of({renamed(key): tensor for key, tensor in hf().items()})
    assert [problem.what for problem in problems] == [
        "missing tensor, and 4 more of the kind",
        "missing tensor, and 4 more of the kind",
        *["unexpected tensor, and 29 more of the kind"] * 6,
    ]


def test_another_model_is_told_in_one_problem():
    names = ("attn.c_attn.weight", "attn.c_proj.weight", "ln_1.weight", "mlp.c_fc.weight")
    foreign = {f"transformer.h.{layer}.{name}": Tensor("F32", (3,)) for layer in range(5000) for name in names}
    (problem,) = problems_of(foreign | {"lm_head.weight": Tensor("BF16", (50, 40))})
    assert problem.what == "not the tensors of a MiniMax-M2"
    assert problem.key == "transformer.h.0.attn.c_attn.weight"
    assert problem.expected == "names such as embed_tokens.weight"
    assert problem.got == (
        "20,000 unknown names among 20,001: transformer.h.0.attn.c_attn.weight, "
        "transformer.h.0.attn.c_proj.weight, transformer.h.0.ln_1.weight, ..."
    )


def test_another_model_that_shares_some_names_is_told_in_few_problems():
    names = ("self_attn.q_proj.weight", "mlp.gate_proj.weight", "mlp.up_proj.weight", "mlp.down_proj.weight")
    llama = {f"model.layers.{layer}.{name}": Tensor("BF16", (64, 64)) for layer in range(6) for name in names}
    problems = problems_of(llama | {"model.norm.weight": Tensor("BF16", (64,))})
    assert len(problems) < 25
    assert (problems[0].expected, problems[0].got) == ("5: 0 to 4", "0 to 5")


def test_tens_of_thousands_of_faults_make_a_short_message():
    config = CONFIG.replace(num_hidden_layers=20, num_local_experts=250)
    tensors = {key: replace(tensor, dtype="I64") for key, tensor in hf(config=config).items()}
    with pytest.raises(mj.LayoutError) as caught:
        survey(tensors, config)
    assert len(caught.value.problems) == 30
    assert len(str(caught.value)) < 10_000


def test_names_with_many_gaps_make_a_short_message():
    for last, got in ((8, "0 to 4, 6, 8"), (10, "0 to 4, 6, 8, ..."), (2000, "0 to 4, 6, 8, ...")):
        gaps = {f"model.layers.{n}.x": Tensor("BF16", (1,)) for n in range(6, last + 1, 2)}
        count, *_ = problems_of(hf() | gaps)
        assert count.got == got
