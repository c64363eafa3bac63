"""Random LoRA in torch, and the forms in which NeMo writes it."""

import torch
from lora_cases import MLP, NEMO, PEFT, random_lora
from torch_helpers import in_torch

MODERN, LEGACY = {}, {"legacy_paramwrapper_layout": True}
PER_EXPERT = {"v4_compatible": True}
FORMS = [MODERN, LEGACY, PER_EXPERT]
A, B = MLP + "lora_gate_and_up_A", MLP + "lora_gate_and_up_B"
OTHERS = {
    PEFT + "model.layers.0.self_attn.q_proj.lora_A.weight": torch.ones(3, 16),
    "model.layers.0.mlp.gate.lora_B.weight": torch.ones(4, 3),
}
"""LoRA that is not that of experts."""


def factors(names=NEMO, dtype="f32", **options):
    """Random factors of every expert, by name."""
    tensors = in_torch(random_lora(names, **options))
    return {key: tensor.to(torch.bfloat16) if dtype == "bf16" else tensor for key, tensor in tensors.items()}
