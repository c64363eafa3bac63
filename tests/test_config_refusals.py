"""What `MiniMaxConfig` refuses: each fault of a file is told with its place, and so is each of a call."""

import pytest
from config_cases import ABSENT, LEGACY, PUBLISHED, ROPE, TINY, altered, nested, problems_of

from minimax_jax import ConfigError, MiniMaxConfig


@pytest.mark.parametrize(
    ("changes", "key", "expected", "got"),
    [
        ({"quantization_config.quant_method": "gptq"}, "quantization_config.quant_method", "'fp8'", "'gptq'"),
        ({"quantization_config.quant_method": "mxfp8"}, "quantization_config.quant_method", "'fp8'", "'mxfp8'"),
        (
            {"quantization_config.fmt": "float8_e5m2"},
            "quantization_config.fmt",
            "'float8_e4m3fn' or 'e4m3'",
            "'float8_e5m2'",
        ),
        (
            {"quantization_config.activation_scheme": "static"},
            "quantization_config.activation_scheme",
            "'dynamic'",
            "'static'",
        ),
        ({"quantization_config.dequantize": True}, "quantization_config.dequantize", "False", "True"),
        ({"shared_intermediate_size": 1536}, "shared_intermediate_size", "0", "1536"),
        ({"shared_intermediate_size": False}, "shared_intermediate_size", "0", "False"),
        ({"sliding_window": 4096}, "sliding_window", "null", "4096"),
        ({"attn_window_size": 4096}, "attn_window_size", "null", "4096"),
        ({"use_sliding_window": True}, "use_sliding_window", "False", "True"),
        ({"rope_scaling": {"type": "yarn"}}, "rope_scaling", "null", "{'type': 'yarn'}"),
        ({"rope_parameters.rope_type": "yarn"}, "rope_parameters.rope_type", "'default'", "'yarn'"),
        ({"scoring_func": "softmax"}, "scoring_func", "'sigmoid'", "'softmax'"),
        ({"qk_norm_type": "per_head"}, "qk_norm_type", "'per_layer'", "'per_head'"),
        ({"use_qk_norm": False}, "use_qk_norm", "True", "False"),
        ({"use_qk_norm": 1}, "use_qk_norm", "True", "1"),
        ({"use_routing_bias": False}, "use_routing_bias", "True", "False"),
        ({"hidden_act": "gelu"}, "hidden_act", "'silu'", "'gelu'"),
        ({"attention_bias": True}, "attention_bias", "False", "True"),
        ({"routed_scaling_factor": 2.0}, "routed_scaling_factor", "1.0", "2.0"),
        ({"num_expert_group": 8}, "num_expert_group", "1", "8"),
        ({"layernorm_mlp_beta": 0.5}, "layernorm_mlp_beta", "1.0", "0.5"),
        ({"model_type": "mixtral"}, "model_type", "'minimax_m2' or 'minimax'", "'mixtral'"),
        (
            {"architectures": ["MixtralForCausalLM"]},
            "architectures",
            "['MiniMaxM2ForCausalLM']",
            "['MixtralForCausalLM']",
        ),
    ],
)
def test_unsupported_values(changes, key, expected, got):
    (problem,) = problems_of(altered(LEGACY, changes))
    assert (problem.what, problem.key, problem.expected, problem.got) == (f"unsupported {key}", key, expected, got)


@pytest.mark.parametrize("kinds", [[1] * 61 + [0], [0] * 62, [1] * 61, [1] * 63, [], "1" * 62, 1, [[1]] * 62, {"0": 1}])
def test_anything_but_full_attention_in_every_layer(kinds):
    (problem,) = problems_of(altered(LEGACY, {"attn_type_list": kinds}))
    assert problem.key == "attn_type_list"
    assert problem.expected == "62 times 1: full attention in every layer"


@pytest.mark.parametrize(
    ("name", "value", "kind"),
    [
        ("hidden_size", True, "a positive integer"),
        ("hidden_size", "3072", "a positive integer"),
        ("hidden_size", 3072.0, "a positive integer"),
        ("hidden_size", -3072, "a positive integer"),
        ("hidden_size", 0, "a positive integer"),
        ("hidden_size", [3072], "a positive integer"),
        ("hidden_size", {}, "a positive integer"),
        ("vocab_size", float("nan"), "a positive integer"),
        ("vocab_size", 10**400, "a positive integer"),
        ("head_dim", "128", "a positive integer"),
        ("rotary_dim", 64.5, "a positive integer"),
        ("rope_theta", float("nan"), "a positive number"),
        ("rope_theta", float("inf"), "a positive number"),
        ("rope_theta", 10**400, "a positive number"),
        ("rope_theta", 0, "a positive number"),
        ("rope_theta", "5e6", "a positive number"),
        ("rope_theta", True, "a positive number"),
        ("rms_norm_eps", -1e-6, "a positive number"),
        ("rms_norm_eps", 0.0, "a positive number"),
        ("tie_word_embeddings", 0, "true or false"),
        ("tie_word_embeddings", "false", "true or false"),
        ("dtype", "float8_e4m3fn", "bfloat16, float32 or float16"),
        ("dtype", ["bfloat16"], "bfloat16, float32 or float16"),
    ],
)
def test_values_of_a_wrong_kind(name, value, kind):
    (problem,) = problems_of(altered(LEGACY, {name: value}))
    assert problem.what == f"{name} must be {kind}"
    assert problem.key == name
    assert problem.got is not None and len(problem.got) < 100


@pytest.mark.parametrize("block", [[128], [128, 128, 128], [0, 128], [128.0, 128], [True, True], 128, "128x128", {}])
def test_blocks_that_are_not_blocks(block):
    (problem,) = problems_of(altered(LEGACY, {"quantization_config.weight_block_size": block}))
    assert problem.what == "weight_block_size must be two positive integers, such as [128, 128]"


@pytest.mark.parametrize("names", ["gate", [1], {"gate": 1}, 7])
def test_modules_that_are_not_names(names):
    (problem,) = problems_of(altered(LEGACY, {"quantization_config.modules_to_not_convert": names}))
    assert problem.what == "modules_to_not_convert must be a list of names"


@pytest.mark.parametrize("factor", [0, -0.5, 1.5, float("nan"), float("inf"), "half", True, [0.5], 1e-9])
@pytest.mark.parametrize("name", ["partial_rotary_factor", "rope_parameters.partial_rotary_factor"])
def test_rotary_factors_that_are_none(name, factor):
    (problem,) = problems_of(altered(LEGACY, {"rotary_dim": ABSENT, name: factor}))
    assert problem.what == "rotary_dim must be a positive integer"
    assert problem.key == "rotary_dim"


@pytest.mark.parametrize("name", ["quantization_config", "rope_parameters"])
@pytest.mark.parametrize("value", ["fp8", [], 7, False])
def test_objects_that_are_not_objects(name, value):
    problems = problems_of(altered(LEGACY, {name: value}))
    assert problems[-1].what == f"{name} must be an object"


@pytest.mark.parametrize(
    ("changes", "field", "expected"),
    [
        ({"num_attention_heads": 44}, "num_key_value_heads", "a divisor of num_attention_heads = 44"),
        ({"rotary_dim": 130}, "rotary_dim", "an even number up to head_dim = 128"),
        ({"rotary_dim": 63}, "rotary_dim", "an even number up to head_dim = 128"),
        ({"num_experts_per_tok": 257}, "num_experts_per_tok", "at most num_local_experts = 256"),
        ({"num_local_experts": 10**12}, "num_local_experts", "a plausible number: at most 262144 over"),
        ({"num_hidden_layers": 10**12, "attn_type_list": ABSENT}, "num_local_experts", "a plausible number"),
    ],
)
def test_values_that_contradict_each_other(changes, field, expected):
    (problem,) = problems_of(altered(LEGACY, changes))
    assert (problem.what, problem.key) == (f"impossible {field}", field)
    assert expected in problem.expected


def test_a_trillion_layers_with_a_list_of_attention_kinds_cost_no_memory():
    assert [problem.key for problem in problems_of(LEGACY | {"num_hidden_layers": 10**12})] == [
        "num_local_experts",
        "attn_type_list",
    ]


@pytest.mark.parametrize(
    ("changes", "field", "got"),
    [
        (
            {"rope_parameters": {"partial_rotary_factor": 0.25}},
            "rotary_dim",
            "64 by rotary_dim, 32 by rope_parameters.partial_rotary_factor",
        ),
        ({"partial_rotary_factor": 1.0}, "rotary_dim", "64 by rotary_dim, 128 by partial_rotary_factor"),
        (
            {"rope_parameters": {"rope_theta": 1e4}},
            "rope_theta",
            "5000000 by rope_theta, 10000.0 by rope_parameters.rope_theta",
        ),
        (
            {"dtype": "bfloat16", "torch_dtype": "float32"},
            "dtype",
            "'bfloat16' by dtype, 'float32' by torch_dtype",
        ),
    ],
)
def test_legacy_and_v5_attributes_that_disagree(changes, field, got):
    (problem,) = problems_of(altered(LEGACY, changes))
    assert (problem.what, problem.key, problem.got) == (f"attributes disagree about {field}", field, got)


def test_both_forms_together_are_fine_where_they_agree():
    assert MiniMaxConfig.from_dict(LEGACY | {"rope_parameters": ROPE, "torch_dtype": "bfloat16"}) == PUBLISHED


@pytest.mark.parametrize("head_dim", ["128", ABSENT])
@pytest.mark.parametrize("factor", [0.5, ABSENT])
def test_a_bad_head_dim_is_told_once(head_dim, factor):
    changes = {"head_dim": head_dim, "rotary_dim": ABSENT, "partial_rotary_factor": factor}
    assert [problem.key for problem in problems_of(altered(LEGACY, changes))] == ["head_dim"]


def test_what_json_can_hold_is_kept():
    value = {"a": nested(6, list), "b": nested(6, dict), "c": ["\u00e9", 1, 0.5, True, None], 3: "x"}
    assert MiniMaxConfig.from_dict(LEGACY | {"id2label": value}).extra["id2label"] == value


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("value", [ABSENT, None])
def test_missing_sizes(name, value):
    problems = problems_of(altered(LEGACY, {name: value, "attn_type_list": ABSENT}))
    assert [(problem.what, problem.key) for problem in problems] == [("missing attribute", name)]


@pytest.mark.parametrize("name", ["quantization_config.quant_method", "quantization_config.weight_block_size"])
def test_missing_attributes_of_the_quantisation(name):
    (problem,) = problems_of(altered(LEGACY, {name: ABSENT}))
    assert (problem.what, problem.key) == ("missing attribute", name)


def test_num_experts_is_told_apart_from_num_local_experts():
    missing, unknown = problems_of(altered(LEGACY, {"num_local_experts": ABSENT, "num_experts": 256}))
    assert (missing.what, missing.key) == ("missing attribute", "num_local_experts")
    assert (unknown.what, unknown.key) == ("unknown attribute", "num_experts")
    assert unknown.remedy == "MiniMax-M2 calls it num_local_experts"


@pytest.mark.parametrize(
    "name", ["n_shared_experts", "quantization_config.modules", "rope_parameters.factor", "hidden_size "]
)
def test_unknown_attributes(name):
    (problem,) = problems_of(altered(LEGACY, {name: 7}))
    assert (problem.what, problem.key, problem.got) == ("unknown attribute", name, "7")
    assert "--ignore-attribute" in problem.remedy


def test_ignored_attributes_are_kept_in_extra():
    raw = LEGACY | {"from_a_fork": {"a": 1}, "num_experts": 3}
    config = MiniMaxConfig.from_dict(raw, ignore=["from_a_fork", "num_experts"])
    assert config == PUBLISHED
    assert config.extra["from_a_fork"] == {"a": 1}
    assert config.to_dict()["num_experts"] == 3
    assert MiniMaxConfig.from_dict(config.to_dict(), ignore=config.extra).extra == config.extra


def test_known_attributes_cannot_be_ignored():
    (problem,) = problems_of(LEGACY | {"sliding_window": 4096}, ignore=["sliding_window"])
    assert problem.key == "sliding_window"


def test_unknown_attributes_that_say_nothing_are_carried_along():
    assert MiniMaxConfig.from_dict(LEGACY | {"bad_words_ids": None}).to_dict()["bad_words_ids"] is None


@pytest.mark.parametrize(
    "value",
    [float("nan"), float("inf"), "half a pair \ud800", {"\ud800": 1}, nested(9, list), nested(9, dict), {1, 2}, b"x"],
)
def test_kept_attributes_that_could_not_be_written_back(value):
    (problem,) = problems_of(LEGACY | {"id2label": value})
    assert (problem.what, problem.key) == ("not a value that JSON can hold", "id2label")


def test_all_problems_are_reported_at_once_with_the_file():
    changes = {
        "hidden_size": "many",
        "vocab_size": ABSENT,
        "scoring_func": "softmax",
        "rope_parameters.rope_theta": 1.0,
        "rotary_dim": 63,
        "quantization_config.fmt": "e5m2",
        "surprise": 1,
    }
    problems = problems_of(altered(LEGACY, changes), file="somewhere/config.json")
    keys = {"hidden_size", "vocab_size", "scoring_func", "rope_theta", "rotary_dim", "quantization_config.fmt"}
    assert {problem.key for problem in problems} == keys | {"surprise"}
    assert {problem.file for problem in problems} == {"somewhere/config.json"}


def test_a_message_says_what_where_expected_and_got():
    with pytest.raises(ConfigError) as caught:
        MiniMaxConfig.from_dict(LEGACY | {"scoring_func": "softmax"}, file="m2/config.json")
    assert str(caught.value) == (
        "unsupported scoring_func\n"
        "    file: m2/config.json\n"
        "    key: scoring_func\n"
        "    expected: 'sigmoid'\n"
        "    got: 'softmax'"
    )
