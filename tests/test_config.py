"""`MiniMaxConfig` against the published config.json, transformers' own config class, and hostile files."""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import FineGrainedFP8Config, MiniMaxM2Config

from minimax_jax import ConfigError, MiniMaxConfig

# The published config.json of MiniMax-M2, dead keys and all.
LEGACY = {
    "architectures": ["MiniMaxM2ForCausalLM"],
    "attention_dropout": 0.0,
    "attn_type_list": [1] * 62,
    "auto_map": {
        "AutoConfig": "configuration_minimax_m2.MiniMaxM2Config",
        "AutoModelForCausalLM": "modeling_minimax_m2.MiniMaxM2ForCausalLM",
    },
    "bos_token_id": None,
    "eos_token_id": None,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 3072,
    "initializer_range": 0.02,
    "intermediate_size": 1536,
    "layernorm_full_attention_beta": 1.0,
    "layernorm_linear_attention_beta": 1.0,
    "layernorm_mlp_beta": 1.0,
    "max_position_embeddings": 196608,
    "mlp_intermediate_size": 8192,
    "model_type": "minimax_m2",
    "mtp_transformer_layers": 1,
    "num_attention_heads": 48,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 62,
    "num_key_value_heads": 8,
    "num_local_experts": 256,
    "num_mtp_modules": 3,
    "output_router_logits": False,
    "qk_norm_type": "per_layer",
    "quantization_config": {
        "activation_scheme": "dynamic",
        "fmt": "float8_e4m3fn",
        "quant_method": "fp8",
        "weight_block_size": [128, 128],
        "modules_to_not_convert": ["gate", "e_score_correction_bias", "lm_head"],
    },
    "rms_norm_eps": 1e-06,
    "rope_theta": 5000000,
    "rotary_dim": 64,
    "router_aux_loss_coef": 0.001,
    "router_jitter_noise": 0.0,
    "scoring_func": "sigmoid",
    "shared_intermediate_size": 0,
    "shared_moe_mode": "sigmoid",
    "sliding_window": None,
    "tie_word_embeddings": False,
    "transformers_version": "4.57.1",
    "use_cache": True,
    "use_mtp": True,
    "use_qk_norm": True,
    "use_routing_bias": True,
    "vocab_size": 200064,
}

PUBLISHED = MiniMaxConfig(
    hidden_size=3072,
    intermediate_size=1536,
    num_hidden_layers=62,
    num_local_experts=256,
    num_experts_per_tok=8,
    num_attention_heads=48,
    num_key_value_heads=8,
    head_dim=128,
    rotary_dim=64,
    vocab_size=200064,
    rope_theta=5e6,
    rms_norm_eps=1e-6,
    max_position_embeddings=196608,
    tie_word_embeddings=False,
    dtype="bfloat16",
    weight_block_size=(128, 128),
    modules_to_not_convert=("gate", "e_score_correction_bias", "lm_head"),
)

FP8 = LEGACY["quantization_config"]
ROPE = {"rope_type": "default", "rope_theta": 5e6, "partial_rotary_factor": 0.5}

# The second published form.
MODERN = json.loads(MiniMaxM2Config(rope_parameters=ROPE, quantization_config=FP8).to_json_string(use_diff=False))

TINY = {
    "hidden_size": 96,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 50,
}

ABSENT = object()


def altered(base, changes):
    """`base` with dotted names set, or removed where the value is ABSENT."""
    raw = copy.deepcopy(base)
    for name, value in changes.items():
        *path, last = name.split(".")
        node = raw
        for step in path:
            node = node.setdefault(step, {})
        if value is ABSENT:
            node.pop(last, None)
        else:
            node[last] = value
    return raw


def problems_of(raw, **options):
    with pytest.raises(ConfigError) as caught:
        MiniMaxConfig.from_dict(raw, **options)
    return caught.value.problems


def nested(depth, kind):
    value = 0
    for _ in range(depth):
        value = [value] if kind is list else {"in": value}
    return value


def write_config(folder, raw):
    (folder / "config.json").write_text(raw if isinstance(raw, str) else json.dumps(raw))
    return folder


# ---- both published forms


def test_the_published_legacy_form():
    assert MiniMaxConfig.from_dict(LEGACY) == PUBLISHED


def test_the_v5_form_says_the_same():
    assert MiniMaxConfig.from_dict(MODERN) == PUBLISHED


def test_equal_configs_are_one_key():
    assert {MiniMaxConfig.from_dict(LEGACY): 1}[MiniMaxConfig.from_dict(MODERN)] == 1


def test_the_first_revision_called_the_model_minimax():
    assert MiniMaxConfig.from_dict(LEGACY | {"model_type": "minimax"}) == PUBLISHED


def test_m2_7_differs_in_its_context_alone():
    config = MiniMaxConfig.from_dict(LEGACY | {"max_position_embeddings": 204800})
    assert config == PUBLISHED.replace(max_position_embeddings=204800) != PUBLISHED


@pytest.mark.parametrize(
    ("rope", "rotary_dim"),
    [
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}}, 8),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}, 16),
        ({"rope_theta": 1e4, "rotary_dim": 8}, 8),
        ({"rope_theta": 1e4, "partial_rotary_factor": 0.5}, 8),
        ({"rope_theta": 1e4}, 16),
    ],
)
def test_save_pretrained_of_transformers(tmp_path, rope, rotary_dim):
    MiniMaxM2Config(**TINY, **rope, dtype="float32", rms_norm_eps=1e-5, tie_word_embeddings=True).save_pretrained(
        tmp_path
    )
    config = MiniMaxConfig.from_pretrained(tmp_path)
    expected = {"rotary_dim": rotary_dim, "rope_theta": 1e4, "rms_norm_eps": 1e-5, "tie_word_embeddings": True}
    assert config == MiniMaxConfig(**TINY, **expected, dtype="float32")


def test_to_dict_of_transformers():
    raw = MiniMaxM2Config(**TINY).to_dict()
    assert raw["dtype"] is None
    assert MiniMaxConfig.from_dict(raw) == MiniMaxConfig(**TINY, rotary_dim=16)


def test_quantization_config_of_transformers():
    raw = MiniMaxM2Config(**TINY).to_dict() | {"quantization_config": FineGrainedFP8Config().to_dict()}
    assert MiniMaxConfig.from_dict(raw) == MiniMaxConfig(**TINY, rotary_dim=16, weight_block_size=(128, 128))


def test_head_dim_decides_where_nothing_is_said_about_rotary_dims():
    raw = altered(LEGACY, {"rotary_dim": ABSENT, "rope_theta": ABSENT})
    config = MiniMaxConfig.from_dict(raw)
    assert (config.rotary_dim, config.rope_theta) == (128, 5e6)


@pytest.mark.parametrize("factor", [0.3, 0.5, 0.26, 1, 1.0])
def test_rotary_factors_round_as_in_transformers(factor):
    from transformers.models.minimax_m2.modeling_minimax_m2 import MiniMaxM2RotaryEmbedding

    config = MiniMaxM2Config(**TINY, rope_parameters={**ROPE, "partial_rotary_factor": factor})
    rotated = 2 * MiniMaxM2RotaryEmbedding(config).inv_freq.shape[0]
    assert MiniMaxConfig.from_dict(config.to_dict()).rotary_dim == rotated


@pytest.mark.parametrize("block", [(128, 128), (64, 32), None])
def test_block_falls_back_to_the_published_one(block):
    config = PUBLISHED.replace(weight_block_size=block)
    assert config.block == (block or (128, 128))


# ---- what is written


@pytest.mark.parametrize("raw", [LEGACY, MODERN], ids=["legacy", "v5"])
def test_the_union_comes_back_equal(raw):
    config = MiniMaxConfig.from_dict(raw)
    written = json.loads(json.dumps(config.to_dict(), allow_nan=False))
    again = MiniMaxConfig.from_dict(written)
    assert again == config
    assert again.extra == config.extra
    assert again.to_dict() == config.to_dict()


def test_the_union_has_the_attributes_of_both_forms():
    written = MiniMaxConfig.from_dict(LEGACY).to_dict()
    assert {name: written[name] for name in LEGACY} == LEGACY
    assert written["rope_parameters"] == ROPE
    assert written["dtype"] == written["torch_dtype"] == "bfloat16"


def test_the_v5_form_is_completed_with_what_vllm_and_sglang_look_up():
    written = MiniMaxConfig.from_dict(MODERN).to_dict()
    looked_up = (
        *("attn_type_list", "qk_norm_type", "quantization_config", "rope_theta", "rotary_dim"),
        *("scoring_func", "shared_intermediate_size", "use_qk_norm", "use_routing_bias"),
    )
    assert {name: written[name] for name in looked_up} == {name: LEGACY[name] for name in looked_up}


def test_transformers_reads_the_union():
    read = MiniMaxM2Config.from_dict(MiniMaxConfig.from_dict(LEGACY).to_dict())
    assert read.rope_parameters == ROPE
    assert str(read.dtype).endswith("bfloat16")
    for name in TINY:
        assert getattr(read, name) == LEGACY[name], name


def test_transformers_rotates_as_many_dims_as_were_written():
    from transformers.models.minimax_m2.modeling_minimax_m2 import MiniMaxM2RotaryEmbedding

    for head_dim in range(2, 260, 2):
        for rotary_dim in {2, head_dim // 4 * 2 or 2, head_dim}:
            config = MiniMaxConfig(**TINY | {"head_dim": head_dim}, rotary_dim=rotary_dim)
            assert MiniMaxConfig.from_dict(altered(config.to_dict(), {"rotary_dim": ABSENT})) == config
            embedding = MiniMaxM2RotaryEmbedding(MiniMaxM2Config.from_dict(config.to_dict()))
            assert 2 * embedding.inv_freq.shape[0] == rotary_dim, (head_dim, rotary_dim)


def test_quantization_config_is_written_for_fp8_alone():
    assert PUBLISHED.to_dict()["quantization_config"] == FP8
    assert "quantization_config" not in PUBLISHED.replace(weight_block_size=None).to_dict()
    assert PUBLISHED.replace(weight_block_size=(64, 32)).to_dict()["quantization_config"]["weight_block_size"] == [
        64,
        32,
    ]


def test_changes_reach_what_is_written():
    written = MiniMaxConfig.from_dict(LEGACY).replace(num_hidden_layers=3, rotary_dim=32).to_dict()
    assert written["attn_type_list"] == [1, 1, 1]
    assert written["rope_parameters"]["partial_rotary_factor"] == 0.25


def test_a_top_level_factor_does_not_outlive_a_change():
    raw = altered(LEGACY, {"partial_rotary_factor": 0.5})
    written = MiniMaxConfig.from_dict(raw).replace(rotary_dim=32).to_dict()
    assert MiniMaxConfig.from_dict(written).rotary_dim == 32


def test_dead_attributes_are_kept_and_written_back():
    config = MiniMaxConfig.from_dict(LEGACY)
    assert config.extra["mlp_intermediate_size"] == 8192
    assert config.extra["num_mtp_modules"] == 3
    assert config.extra["eos_token_id"] is None
    assert config.to_dict()["mlp_intermediate_size"] == 8192


def test_a_config_shares_nothing_with_what_it_was_read_from_or_written_to():
    raw = copy.deepcopy(LEGACY)
    config = MiniMaxConfig.from_dict(raw)
    raw["auto_map"]["AutoConfig"] = "changed"
    config.to_dict()["auto_map"]["AutoConfig"] = "changed"
    config.to_dict()["architectures"].append("changed")
    assert config.to_dict()["auto_map"] == LEGACY["auto_map"]
    assert config.to_dict()["architectures"] == LEGACY["architectures"]


# ---- what is refused


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


# ---- built in Python


@pytest.mark.parametrize(
    "changes",
    [
        {"hidden_size": 0},
        {"hidden_size": True},
        {"hidden_size": 64.0},
        {"dtype": "int8"},
        {"weight_block_size": [128, 128]},
        {"weight_block_size": (128, 0)},
        {"modules_to_not_convert": ["gate"]},
        {"rms_norm_eps": float("nan")},
        {"rotary_dim": 7},
    ],
)
def test_a_config_built_by_hand_is_checked_as_well(changes):
    with pytest.raises(ConfigError) as caught:
        PUBLISHED.replace(**changes)
    assert [problem.key for problem in caught.value.problems] == list(changes)


def test_replace_refuses_unknown_names():
    with pytest.raises(TypeError):
        PUBLISHED.replace(layers=2)


# ---- files


def test_a_folder_and_the_file_in_it(tmp_path):
    write_config(tmp_path, LEGACY)
    for path in (tmp_path, str(tmp_path), tmp_path / "config.json", str(tmp_path / "config.json")):
        assert MiniMaxConfig.from_pretrained(path) == PUBLISHED


def test_a_relative_path_that_looks_like_a_hub_name(tmp_path, monkeypatch):
    (tmp_path / "checkpoint").mkdir()
    write_config(tmp_path / "checkpoint", LEGACY)
    monkeypatch.chdir(tmp_path)
    assert MiniMaxConfig.from_pretrained("checkpoint/config.json") == PUBLISHED


def test_problems_in_a_file_name_it(tmp_path):
    with pytest.raises(ConfigError) as caught:
        MiniMaxConfig.from_pretrained(write_config(tmp_path, {}))
    assert {problem.file for problem in caught.value.problems} == {str(tmp_path / "config.json")}


def test_ignore_reaches_a_file(tmp_path):
    write_config(tmp_path, LEGACY | {"surprise": 1})
    assert MiniMaxConfig.from_pretrained(tmp_path, ignore=["surprise"]) == PUBLISHED


@pytest.mark.parametrize(
    ("text", "got"),
    [
        ("", "Expecting value"),
        ("{", "Expecting property name"),
        ("{} {}", "Extra data"),
        ('{"rope_theta": NaN}', "NaN is not JSON"),
        ('{"rope_theta": -Infinity}', "-Infinity is not JSON"),
        ('{"hidden_size": 1, "hidden_size": 2}', "named twice: 'hidden_size'"),
        ("[" * 100_000, "recursion"),
        ('{"a":' * 100_000, "recursion"),
        ('{"hidden_size": ' + "9" * 5000 + "}", "4300 digits"),
        (" " * (2**24 + 1), "more than 16777216 bytes"),
    ],
    ids=lambda value: value[:20],
)
def test_files_that_are_not_json(tmp_path, text, got):
    with pytest.raises(ConfigError) as caught:
        MiniMaxConfig.from_pretrained(write_config(tmp_path, text))
    (problem,) = caught.value.problems
    assert problem.what == "config.json cannot be read"
    assert problem.file == str(tmp_path / "config.json")
    assert got in problem.got


def test_files_that_are_not_utf8(tmp_path):
    (tmp_path / "config.json").write_bytes(b'{"a": "\xff"}')
    with pytest.raises(ConfigError, match="cannot be read"):
        MiniMaxConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize(("text", "got"), [("[]", "list"), ("null", "NoneType"), ('"x"', "str"), ("1e400", "float")])
def test_json_that_is_no_object(tmp_path, text, got):
    with pytest.raises(ConfigError) as caught:
        MiniMaxConfig.from_pretrained(write_config(tmp_path, text))
    (problem,) = caught.value.problems
    assert (problem.what, problem.got) == ("config.json is not a JSON object", got)


def test_numbers_too_large_for_a_float(tmp_path):
    text = json.dumps(LEGACY).replace("1e-06", "1e400").replace("0.02", "1e400")
    with pytest.raises(ConfigError) as caught:
        MiniMaxConfig.from_pretrained(write_config(tmp_path, text))
    assert [problem.key for problem in caught.value.problems] == ["rms_norm_eps", "initializer_range"]


def test_deep_values_are_refused_in_few_words(tmp_path):
    deep = json.dumps(LEGACY)[:-1] + ', "surprise": ' + "[" * 400 + "]" * 400 + "}"
    with pytest.raises(ConfigError) as caught:
        MiniMaxConfig.from_pretrained(write_config(tmp_path, deep))
    assert {problem.key for problem in caught.value.problems} == {"surprise"}
    assert len(str(caught.value)) < 1000


def test_names_in_messages_are_printable_and_short():
    problems = problems_of(LEGACY | {"\x1b[2J": 1, "n" * 10_000: 1})
    assert all(problem.key.isprintable() and len(problem.key) < 100 for problem in problems)


@pytest.mark.parametrize("name", ["nowhere", "a/b/c", "/nowhere/at/all", "./nowhere", "../a/b"])
def test_a_path_that_does_not_exist(name):
    with pytest.raises(ConfigError) as caught:
        MiniMaxConfig.from_pretrained(name)
    (problem,) = caught.value.problems
    assert (problem.what, problem.file) == ("no such file", str(Path(name)))
    assert problem.remedy is not None


def test_a_folder_without_a_config_is_not_looked_for_on_the_hub(tmp_path, monkeypatch):
    (tmp_path / "org" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError) as caught:
        MiniMaxConfig.from_pretrained("org/name")
    (problem,) = caught.value.problems
    assert (problem.what, problem.file) == ("no such file", "org/name/config.json")


def test_a_config_that_is_no_regular_file(tmp_path):
    (tmp_path / "config.json").mkdir()
    with pytest.raises(ConfigError, match="not a regular file"):
        MiniMaxConfig.from_pretrained(tmp_path)


# ---- the hub


@pytest.fixture
def hub_cache(tmp_path, monkeypatch):
    """A local hub cache, and no network."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path


def fill(cache, repository, raw):
    """Lay `raw` out as the hub client does: refs name a commit, whose snapshot links to blobs."""
    folder, commit = cache / ("models--" + repository.replace("/", "--")), "0" * 40
    for name in ("refs", "blobs", f"snapshots/{commit}"):
        (folder / name).mkdir(parents=True)
    (folder / "refs/main").write_text(commit)
    (folder / "blobs/abc").write_text(json.dumps(raw))
    (folder / f"snapshots/{commit}/config.json").symlink_to("../../blobs/abc")
    return folder / f"snapshots/{commit}/config.json"


def test_a_hub_name_is_found_in_the_cache(hub_cache):
    fill(hub_cache, "MiniMaxAI/MiniMax-M2", LEGACY)
    assert MiniMaxConfig.from_pretrained("MiniMaxAI/MiniMax-M2") == PUBLISHED


def test_the_environment_says_where_the_cache_is(tmp_path):
    fill(tmp_path / "hub", "org/name", LEGACY)
    environment = {**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    environment.pop("HF_HUB_CACHE", None)
    script = "import minimax_jax as mj; print(mj.MiniMaxConfig.from_pretrained('org/name'))"
    result = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == str(PUBLISHED)


def test_problems_in_a_cached_config_name_its_file(hub_cache):
    file = fill(hub_cache, "org/name", LEGACY | {"scoring_func": "softmax"})
    with pytest.raises(ConfigError) as caught:
        MiniMaxConfig.from_pretrained("org/name")
    assert caught.value.problems[0].file == str(file)


@pytest.mark.parametrize("name", ["org/absent", "or g/na!me", "org/" + "n" * 200])
def test_a_hub_name_that_is_not_there(hub_cache, name):
    with pytest.raises(ConfigError) as caught:
        MiniMaxConfig.from_pretrained(name)
    (problem,) = caught.value.problems
    assert problem.what == "neither a local folder nor a hub repository that can be reached"
    assert problem.file == name
    assert "org/name" in problem.remedy


def test_a_hub_name_without_the_client(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ConfigError) as caught:
        MiniMaxConfig.from_pretrained("org/name")
    (problem,) = caught.value.problems
    assert (problem.what, problem.file) == ("no such folder", "org/name")
    assert "minimax_jax[hub]" in problem.remedy


def test_local_files_need_no_client(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert MiniMaxConfig.from_pretrained(write_config(tmp_path, LEGACY)) == PUBLISHED
