"""One model in every layout, put together by plain numpy."""

import numpy as np
from helpers import BF16, config, native_of, random_hf

CONFIG = config(num_hidden_layers=3, num_local_experts=4)
HF = random_hf(CONFIG)
NATIVE = native_of(HF, CONFIG, BF16)
HEADS, KV_HEADS, HEAD, HIDDEN = 2, 1, 64, 320
FURTHER = ("transformers-v5", "maxtext", "maxtext-unscanned")


def weight(layer, name):
    """A weight as Hugging Face stores it, in bfloat16 where it is FP8 there; experts from the native tree."""
    return NATIVE[f"model.layers.{layer}.{name}"]


def expert(layer, number, name):
    """`w1`, `w3` [inter, hidden] or `w2` [hidden, inter], dequantised by hand."""
    grouped = weight(layer, "mlp.experts.down_projs" if name == "w2" else "mlp.experts.gate_and_up_projs")[number]
    gate, up = np.split(grouped, 2, axis=1)
    return {"w1": gate, "w3": up, "w2": grouped}[name].T


def maxtext_layer(layer):
    """One layer as MaxText's converter for Qwen3-MoE makes it: kernels are `W.T.reshape(target_shape)`."""

    def kernel(name, *shape):
        return weight(layer, f"self_attn.{name}.weight").T.reshape(shape)

    return {
        "pre_self_attention_layer_norm.scale": weight(layer, "input_layernorm.weight"),
        "self_attention.query.kernel": kernel("q_proj", HIDDEN, HEADS, HEAD),
        "self_attention.key.kernel": kernel("k_proj", HIDDEN, KV_HEADS, HEAD),
        "self_attention.value.kernel": kernel("v_proj", HIDDEN, KV_HEADS, HEAD),
        "self_attention.out.kernel": kernel("o_proj", HEADS, HEAD, HIDDEN),
        "self_attention.query_norm.scale": weight(layer, "self_attn.q_norm.weight"),
        "self_attention.key_norm.scale": weight(layer, "self_attn.k_norm.weight"),
        "post_self_attention_layer_norm.scale": weight(layer, "post_attention_layernorm.weight"),
        "moe_block.gate.kernel": weight(layer, "mlp.gate.weight").T,
        "moe_block.gate.bias": weight(layer, "mlp.gate.e_score_correction_bias"),
        "moe_block.wi_0": np.stack([expert(layer, number, "w1").T for number in range(4)]),
        "moe_block.wi_1": np.stack([expert(layer, number, "w3").T for number in range(4)]),
        "moe_block.wo": np.stack([expert(layer, number, "w2").T for number in range(4)]),
    }


def maxtext(scanned):
    """The whole of MaxText's params, with a stack along the second axis where layers are scanned."""
    layers = [maxtext_layer(layer) for layer in range(3)]
    tree = {
        "token_embedder.embedding": NATIVE["model.embed_tokens.weight"],
        "decoder.decoder_norm.scale": NATIVE["model.norm.weight"],
        "decoder.logits_dense.kernel": NATIVE["lm_head.weight"].T,
    }
    if scanned:
        tree |= {f"decoder.layers.{name}": np.stack([layer[name] for layer in layers], axis=1) for name in layers[0]}
    else:
        tree |= {f"decoder.layers_{n}.{name}": array for n, layer in enumerate(layers) for name, array in layer.items()}
    return {f"params.params.{name}": array for name, array in tree.items()}


def transformers_v5():
    """What transformers' module has: the two matrices of an expert one below the other, nothing transposed."""
    tree = {key: array for key, array in NATIVE.items() if ".experts." not in key and "e_score" not in key}
    for layer in range(3):
        mlp = f"model.layers.{layer}.mlp."
        pairs = [[expert(layer, number, name) for name in ("w1", "w3")] for number in range(4)]
        tree[mlp + "experts.gate_up_proj"] = np.stack([np.concatenate(pair) for pair in pairs])
        tree[mlp + "experts.down_proj"] = np.stack([expert(layer, number, "w2") for number in range(4)])
        tree[mlp + "e_score_correction_bias"] = weight(layer, "mlp.gate.e_score_correction_bias")
    return tree


WANT = {"transformers-v5": transformers_v5(), "maxtext": maxtext(True), "maxtext-unscanned": maxtext(False)}
