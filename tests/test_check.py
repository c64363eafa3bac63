"""The check of a checkpoint's tensors: good ones pass, and every fault is told once, in few words, with its place."""

import random
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

import minimax_jax as mj
from minimax_jax.layout.check import detect, survey
from minimax_jax.layout.specs import specs

CONFIG = mj.MiniMaxConfig(
    hidden_size=40,
    intermediate_size=24,
    num_hidden_layers=5,
    num_local_experts=6,
    num_experts_per_tok=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=6,
    rotary_dim=4,
    vocab_size=50,
    weight_block_size=(16, 16),
)

LAYER = "model.layers.3."
Q = LAYER + "self_attn.q_proj.weight"
MOE = LAYER + "block_sparse_moe."
W1, W2, W3 = (f"{MOE}experts.4.{part}.weight" for part in ("w1", "w2", "w3"))
GATE_AND_UP = LAYER + "mlp.experts.gate_and_up_projs"
SCALE = "_scale_inv"


@dataclass(frozen=True)
class Tensor:
    dtype: str
    shape: tuple[int, ...]
    file: Path | None = Path("shard.safetensors")


def tree(tensors):
    """In an order that is not the table's: a check may not depend on it."""
    stored = [(spec.key, Tensor(spec.dtype, spec.shape)) for spec in tensors]
    random.Random(0).shuffle(stored)
    return dict(stored)


def hf(scaled="F8_E4M3", config=CONFIG, prefix="model."):
    return tree(specs(config, prefix).hf(scaled))


def native(scaled="BF16", config=CONFIG, prefix="model."):
    return tree(specs(config, prefix).native(scaled))


def without(tensors, *parts):
    return {key: tensor for key, tensor in tensors.items() if not any(part in key for part in parts)}


def problems_of(tensors, config=CONFIG, **options):
    with pytest.raises(mj.LayoutError) as caught:
        survey(tensors, config, **options)
    return caught.value.problems


def told(problem):
    return problem.what, problem.file, problem.key, problem.expected, problem.got


# ---- good ones


@pytest.mark.parametrize("prefix", ["model.", ""])
@pytest.mark.parametrize("scaled", ["F8_E4M3", "BF16", "F32", "F16"])
@pytest.mark.parametrize("layout", ["hf", "native"])
def test_good_trees(layout, scaled, prefix):
    checked = survey((hf if layout == "hf" else native)(scaled, prefix=prefix), CONFIG)
    assert checked.layout == layout
    assert checked.specs is specs(CONFIG, prefix)
    assert list(checked.entries) == list(checked.specs.entries)
    assert checked.dtypes == {entry.native: entry.dtype(scaled) for entry in checked.specs.entries}


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
def test_a_router_of_any_float_is_let_through(dtype):
    tensors = hf()
    tensors[MOE + "gate.weight"] = Tensor(dtype, (6, 40))
    assert survey(tensors, CONFIG).dtypes[LAYER + "mlp.gate.weight"] == dtype


def test_entries_may_differ_in_dtype():
    tensors = hf("BF16") | {key: tensor for key, tensor in hf().items() if key.startswith(Q)}
    dtypes = survey(tensors, CONFIG).dtypes
    assert (dtypes[Q], dtypes[GATE_AND_UP]) == ("F8_E4M3", "BF16")


@pytest.mark.parametrize(
    ("keys", "layout"),
    [
        ([W1], "hf"),
        ([MOE + "gate.weight"], "hf"),
        ([GATE_AND_UP], "native"),
        ([LAYER + "mlp.gate.e_score_correction_bias"], "native"),
        ([Q, Q + SCALE, "lm_head.weight"], None),
        (["transformer.wte.weight"], None),
        ([], None),
    ],
)
def test_detect(keys, layout):
    assert detect(keys, specs(CONFIG)) == layout


@pytest.mark.parametrize("layout", ["hf", "native", None])
def test_names_that_both_layouts_share_pass_as_either(layout):
    shared = {key: tensor for key, tensor in hf().items() if key.startswith(Q)}
    assert survey(shared, CONFIG, layout=layout, partial=True).layout == (layout or "hf")


# ---- one fault, one problem


def fault(what, key, expected, got, *, file="shard.safetensors"):
    return what, file, key, expected, got


LOST_Q = fault("missing tensor", Q, "1 for model.layers.{layer}.self_attn.q_proj.weight", "0", file=None)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        pytest.param({Q: None, Q + SCALE: None}, LOST_Q, id="missing tensor"),
        pytest.param(
            {W3: None, W3 + SCALE: None},
            fault("missing tensor", W3, "12 for model.layers.{layer}.mlp.experts.gate_and_up_projs", "11", file=None),
            id="missing expert part",
        ),
        pytest.param(
            {MOE + "experts.4.gate_proj.weight": Tensor("BF16", (24, 40))},
            fault("unexpected tensor", MOE + "experts.4.gate_proj.weight", "no such tensor", "BF16 [24, 40]"),
            id="wrong expert name",
        ),
        pytest.param(
            {LAYER + "input_layernorm.weight_scale_inv": Tensor("F32", (1,))},
            fault("unexpected tensor", LAYER + "input_layernorm.weight_scale_inv", "no such tensor", "F32 [1]"),
            id="scales of what is never quantised",
        ),
        pytest.param(
            {"layers.3.self_attn.q_proj.weight": Tensor("BF16", (24, 40))},
            fault("unexpected tensor", "layers.3.self_attn.q_proj.weight", "no such tensor", "BF16 [24, 40]"),
            id="a name without its prefix",
        ),
        pytest.param(
            {Q + SCALE: None},
            fault("FP8 weight without its scales", Q, "a tensor of that name with _scale_inv behind it", "none"),
            id="FP8 without scales",
        ),
        pytest.param(
            {W2 + SCALE: None},
            fault("FP8 weight without its scales", W2, "a tensor of that name with _scale_inv behind it", "none"),
            id="FP8 expert without scales",
        ),
        pytest.param(
            {Q: Tensor("BF16", (24, 40))},
            fault("scales without their FP8 weight", Q + SCALE, "a weight in F8_E4M3", "BF16"),
            id="scales beside BF16",
        ),
        pytest.param(
            {Q + SCALE: Tensor("F32", (3, 2))},
            fault("wrong grid of scales", Q + SCALE, "[2, 3]", "[3, 2]"),
            id="wrong grid",
        ),
        pytest.param(
            {W1 + SCALE: Tensor("F32", (24, 40))},
            fault("wrong grid of scales", W1 + SCALE, "[2, 3]", "[24, 40]"),
            id="expanded scales",
        ),
        pytest.param(
            {Q + SCALE: Tensor("BF16", (2, 3))},
            fault("wrong dtype", Q + SCALE, "F32", "BF16"),
            id="scale dtype",
        ),
        pytest.param(
            {W1 + SCALE: Tensor("F8_E8M0", (2, 3))},
            fault("wrong dtype", W1 + SCALE, "F32", "F8_E8M0"),
            id="MXFP8 scales",
        ),
        pytest.param(
            {W2: Tensor("F8_E4M3", (24, 40))},
            fault("wrong shape", W2, "[40, 24]", "[24, 40]"),
            id="transposed",
        ),
        pytest.param(
            {"lm_head.weight": Tensor("BF16", (49, 40))},
            fault("wrong shape", "lm_head.weight", "[50, 40]", "[49, 40]"),
            id="wrong shape",
        ),
        pytest.param(
            {Q: Tensor("I64", (24, 40)), Q + SCALE: None},
            fault("wrong dtype", Q, "F8_E4M3 or BF16 or F32 or F16", "I64"),
            id="I64 weight",
        ),
        pytest.param(
            {MOE + "gate.weight": Tensor("F8_E4M3", (6, 40))},
            fault("wrong dtype", MOE + "gate.weight", "BF16 or F32 or F16", "F8_E4M3"),
            id="FP8 router",
        ),
        pytest.param(
            {W1: Tensor("BF16", (24, 40)), W1 + SCALE: None},
            fault("weights of one tensor differ in dtype", W1, "F8_E4M3 throughout", "BF16 and F8_E4M3"),
            id="mixed dtypes",
        ),
    ],
)
@pytest.mark.parametrize("layout", ["hf", None])
def test_one_fault(changes, expected, layout):
    tensors = hf() | changes
    tensors = {key: tensor for key, tensor in tensors.items() if tensor is not None}
    (problem,) = problems_of(tensors, layout=layout)
    assert told(problem) == expected


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        pytest.param(
            {GATE_AND_UP: None, GATE_AND_UP + SCALE: None},
            fault(
                "missing tensor",
                GATE_AND_UP,
                "1 for model.layers.{layer}.mlp.experts.gate_and_up_projs",
                "0",
                file=None,
            ),
            id="missing tensor",
        ),
        pytest.param(
            {GATE_AND_UP: Tensor("F8_E4M3", (6, 48, 40))},
            fault("wrong shape", GATE_AND_UP, "[6, 40, 48]", "[6, 48, 40]"),
            id="transposed, as transformers groups",
        ),
        pytest.param(
            {GATE_AND_UP + SCALE: Tensor("F32", (6, 4, 3))},
            fault("wrong grid of scales", GATE_AND_UP + SCALE, "[6, 3, 4]", "[6, 4, 3]"),
            id="transposed scales",
        ),
        pytest.param(
            {GATE_AND_UP + SCALE: None},
            fault(
                "FP8 weight without its scales", GATE_AND_UP, "a tensor of that name with _scale_inv behind it", "none"
            ),
            id="FP8 without scales",
        ),
    ],
)
def test_one_fault_in_a_native_tree(changes, expected):
    tensors = native("F8_E4M3") | changes
    (problem,) = problems_of({key: tensor for key, tensor in tensors.items() if tensor is not None})
    assert told(problem) == expected


@pytest.mark.parametrize(("shape", "remedy"), [((24, 40), "it looks transposed"), ((40, 23), None), ((960,), None)])
def test_transposed_weights_are_called_so(shape, remedy):
    (problem,) = problems_of(hf() | {W2: Tensor("F8_E4M3", shape)})
    assert problem.remedy == remedy


def test_of_mixed_dtypes_the_first_other_one_is_named():
    others = {f"{MOE}experts.{expert}.w2.weight": Tensor("BF16", (40, 24)) for expert in (2, 3)}
    tensors = {key: tensor for key, tensor in (hf() | others).items() if key.removesuffix(SCALE) not in others}
    (problem,) = problems_of(tensors | others)
    assert (problem.what, problem.key) == ("weights of one tensor differ in dtype", f"{MOE}experts.2.w2.weight")


def test_tensors_in_memory_have_no_file():
    tensors = {key: replace(tensor, file=None) for key, tensor in hf().items()}
    (problem,) = problems_of(tensors | {Q: Tensor("F8_E4M3", (1, 1), file=None)})
    assert problem.file is None


def test_scales_without_any_weight():
    lost, orphan = problems_of(without(hf(), Q) | {Q + SCALE: Tensor("F32", (2, 3))})
    assert told(lost) == LOST_Q
    assert told(orphan) == fault("scales without their FP8 weight", Q + SCALE, "a weight in F8_E4M3", "no weight")


# ---- numbers of layers and experts


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
    (problem,) = problems_of({"model.layers.0.mlp.experts.gate_up_proj": Tensor("BF16", (6, 48, 40))}, partial=True)
    assert (problem.what, problem.key) == ("unexpected tensor", "model.layers.0.mlp.experts.gate_up_proj")


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
