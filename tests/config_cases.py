"""The published config.json in both its forms, a small one, and changes to them."""

import copy
import json

import pytest
from transformers import MiniMaxM2Config

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
