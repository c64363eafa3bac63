"""`MiniMaxConfig` against the published config.json, transformers' own config class; and configs built in Python."""

import copy
import json

import pytest
from config_cases import ABSENT, FP8, LEGACY, MODERN, PUBLISHED, ROPE, TINY, altered
from transformers import FineGrainedFP8Config, MiniMaxM2Config

from minimax_jax import ConfigError, MiniMaxConfig


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
