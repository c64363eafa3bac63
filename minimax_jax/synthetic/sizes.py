"""The sizes of synthetic checkpoints: the published ones, tiny ones, and anything between."""

from __future__ import annotations

from typing import Any

from minimax_jax.layout.config import DEFAULT_BLOCK, MiniMaxConfig

FIRST_ID, LAST_ID = 256, 257
"""Ids of the first and the last token of a text, behind those of the bytes."""

REAL = MiniMaxConfig(
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
    weight_block_size=DEFAULT_BLOCK,
)
"""The published architecture of MiniMax-M2, M2.1 and M2.5: 96,103 tensors, 230 GB."""

TINY = MiniMaxConfig(
    hidden_size=256,
    intermediate_size=72,
    num_hidden_layers=2,
    num_local_experts=4,
    num_experts_per_tok=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,
    rotary_dim=16,
    vocab_size=264,
    max_position_embeddings=512,
    weight_block_size=DEFAULT_BLOCK,
    extra={"bos_token_id": FIRST_ID, "eos_token_id": LAST_ID},  # transformers' own lie beyond a small vocabulary
)
"""A whole model in under 1 MB.

`intermediate_size` and the KV heads are less than one block; a size of several blocks must be whole here, because
transformers takes size / grid for the block and would read 1.5 blocks as two blocks of three quarters.
"""


def config(
    *, layers: int | None = None, experts: int | None = None, real: bool = False, **changes: Any
) -> MiniMaxConfig:
    """`TINY`, or `REAL`, with another number of layers or experts and any other change.

    Experts per token are lowered where there are fewer experts. Unknown names in `changes` raise TypeError.
    """
    base = REAL if real else TINY
    sizes = {"num_hidden_layers": layers, "num_local_experts": experts}
    changes = {name: size for name, size in sizes.items() if size is not None} | changes
    most = changes.get("num_local_experts", base.num_local_experts)
    return base.replace(**{"num_experts_per_tok": min(base.num_experts_per_tok, most), **changes})
