"""The check of a checkpoint's tensors: good ones pass, and every fault is told once, in few words, with its place."""

from dataclasses import replace

import pytest
from check_cases import (
    CONFIG,
    GATE_AND_UP,
    LAYER,
    LOST_Q,
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

from minimax_jax.layout.check import detect, survey
from minimax_jax.layout.specs import specs


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
