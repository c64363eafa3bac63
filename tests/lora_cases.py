"""Random LoRA adapters, and names of theirs."""

import warnings

import helpers
import numpy as np
import torch
from conversion_cases import CONFIGS
from helpers import F32

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import transformers

EXPERTS, HIDDEN, INTER, RANK, LAYERS = 4, 16, 12, 3, 2
CFG = helpers.config(
    hidden_size=HIDDEN,
    intermediate_size=INTER,
    num_local_experts=EXPERTS,
    num_hidden_layers=LAYERS,
    num_attention_heads=2,
    head_dim=8,
    rotary_dim=4,
    weight_block_size=(8, 4),
)
MANY = CONFIGS["a batch and a rest"]
"""More experts than go at once; its programs are those of other tests."""

PEFT = "base_model.model."
HUB = {"gate": "block_sparse_moe.experts.{}.w1", "up": "block_sparse_moe.experts.{}.w3"}
HUB |= {"down": "block_sparse_moe.experts.{}.w2"}
NEMO = {kind: f"mlp.experts.{{}}.{kind}_proj" for kind in HUB}
MLP = "model.layers.0.mlp.experts."
W1 = PEFT + "model.layers.0.block_sparse_moe.experts.1.w1.lora_A.weight"


def random_lora(names=HUB, *, prefix=PEFT + "model.", shared=True, cfg=CFG, dtype=F32, seed=0):
    """Per-expert LoRA; shared: gate and up of an expert have the same A."""
    rng = np.random.default_rng(seed)
    hidden, inter = cfg.hidden_size, cfg.intermediate_size

    def draw(*shape):
        return rng.standard_normal(shape).astype(dtype)

    tree = {}
    for layer in range(cfg.num_hidden_layers):
        for expert in range(cfg.num_local_experts):
            one_a = draw(RANK, hidden)
            for kind, rows, cols in (("gate", inter, hidden), ("up", inter, hidden), ("down", hidden, inter)):
                module = f"{prefix}layers.{layer}.{names[kind].format(expert)}"
                a = one_a.copy() if shared and kind != "down" else draw(RANK, cols)
                tree |= {f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": draw(rows, RANK)}
    return tree


def keys_of(error):
    return {problem.key for problem in error.value.problems}


def tiny_model(dtype=torch.float32):
    """transformers' model of `CFG`, always the same random one."""
    raw = {**CFG.replace(weight_block_size=None).to_dict(), "bos_token_id": 0, "eos_token_id": 1}
    raw.pop("torch_dtype")
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return transformers.MiniMaxM2ForCausalLM(transformers.MiniMaxM2Config(**raw)).to(dtype)
