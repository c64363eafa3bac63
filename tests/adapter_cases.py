"""Names of one layer, and what the layout does not know, for tests of the adapter."""

import torch

LAYER = "model.layers.0."
MOE = LAYER + "block_sparse_moe."
GATE_UP, DOWN = LAYER + "mlp.experts.gate_and_up_projs", LAYER + "mlp.experts.down_projs"
Q = LAYER + "self_attn.q_proj.weight"
W1 = MOE + "experts.1.w1.weight"
SCALE = "_scale_inv"
UNKNOWN = {
    "model.visual.patch.weight": torch.ones(3),
    "model.layers.1.mlp.experts.something_new": torch.ones(2, 3),
    "model.layers.1.self_attn._extra_state": b"not a tensor",
    "lm_head.bias": torch.ones(3),
}
"""What the layout does not know."""
