"""The tensors of a small checkpoint, typed out by hand from the published names: name, dtype, shape."""

import minimax_jax as mj

SMALL = mj.MiniMaxConfig(
    hidden_size=40,
    intermediate_size=24,
    num_hidden_layers=2,
    num_local_experts=2,
    num_experts_per_tok=1,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=6,
    rotary_dim=4,
    vocab_size=50,
    weight_block_size=(16, 16),
)

FIRST = "model.embed_tokens.weight BF16 50 40"

ATTENTION = """
input_layernorm.weight BF16 40
self_attn.q_proj.weight F8_E4M3 24 40
self_attn.q_proj.weight_scale_inv F32 2 3
self_attn.k_proj.weight F8_E4M3 12 40
self_attn.k_proj.weight_scale_inv F32 1 3
self_attn.v_proj.weight F8_E4M3 12 40
self_attn.v_proj.weight_scale_inv F32 1 3
self_attn.o_proj.weight F8_E4M3 40 24
self_attn.o_proj.weight_scale_inv F32 3 2
self_attn.q_norm.weight BF16 24
self_attn.k_norm.weight BF16 12
post_attention_layernorm.weight BF16 40
"""

HF_MOE = """
block_sparse_moe.gate.weight F32 2 40
block_sparse_moe.e_score_correction_bias F32 2
block_sparse_moe.experts.0.w1.weight F8_E4M3 24 40
block_sparse_moe.experts.0.w1.weight_scale_inv F32 2 3
block_sparse_moe.experts.0.w3.weight F8_E4M3 24 40
block_sparse_moe.experts.0.w3.weight_scale_inv F32 2 3
block_sparse_moe.experts.1.w1.weight F8_E4M3 24 40
block_sparse_moe.experts.1.w1.weight_scale_inv F32 2 3
block_sparse_moe.experts.1.w3.weight F8_E4M3 24 40
block_sparse_moe.experts.1.w3.weight_scale_inv F32 2 3
block_sparse_moe.experts.0.w2.weight F8_E4M3 40 24
block_sparse_moe.experts.0.w2.weight_scale_inv F32 3 2
block_sparse_moe.experts.1.w2.weight F8_E4M3 40 24
block_sparse_moe.experts.1.w2.weight_scale_inv F32 3 2
"""

NATIVE_MOE = """
mlp.gate.weight F32 2 40
mlp.gate.e_score_correction_bias F32 2
mlp.experts.gate_and_up_projs F8_E4M3 2 40 48
mlp.experts.gate_and_up_projs_scale_inv F32 2 3 4
mlp.experts.down_projs F8_E4M3 2 24 40
mlp.experts.down_projs_scale_inv F32 2 2 3
"""

LAST = """
model.norm.weight BF16 40
lm_head.weight BF16 50 40
"""


def whole(moe):
    """Name, shape and dtype of every tensor, where the experts of a layer are those of `moe`; both layers are alike."""
    layers = [f"model.layers.{layer}.{line}" for layer in (0, 1) for line in (ATTENTION + moe).split("\n") if line]
    lines = [FIRST, *layers, *LAST.strip().split("\n")]
    return [(key, tuple(map(int, sizes)), dtype) for key, dtype, *sizes in map(str.split, lines)]


HF, NATIVE = whole(HF_MOE), whole(NATIVE_MOE)


def in_bf16(tensors):
    """Tensors as a checkpoint without FP8 has them: no scales, BF16 where there were codes."""
    return [
        (key, shape, "BF16" if dtype == "F8_E4M3" else dtype)
        for key, shape, dtype in tensors
        if not key.endswith("_scale_inv")
    ]
