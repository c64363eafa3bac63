"""THE table, continued: how further layouts store the same tensors. A layout is a declaration here, and nothing else.

A form gives the names and the order of the axes; `layout.arrangement` works out the rest. Axes are those of the table,
and `expert`, `part` and `layer`; with `*` between them they lie side by side, the first one outermost. What is not
named among the axes stands in the names: one name for each part, `{layer}` for each layer.

**transformers-v5** is the state dict of transformers' `MiniMaxM2ForCausalLM` (version 5), whose experts are fused.

**maxtext** is what MaxText calls `params`, below the two steps that its checkpoints have, with its layers scanned along
the second axis (`param_scan_axis: 1`), experts before layers. MaxText has no MiniMax-M2: names and axes are those of
its Qwen3-MoE (`checkpoint_conversion/utils/param_mapping.py` there), with two that are derived, because Qwen3-MoE lacks
them:

- `moe_block.gate.bias` is what its router calls `e_score_correction_bias` in DeepSeek-V3 (`routed_bias: true`);
- `query_norm` and `key_norm` are over all heads at once, as its `GlobalRMSNorm` of Olmo 3 has them, not over one head.

Weights are not scaled: Qwen3-MoE divides queries by the root of `head_dim` when it runs (`query_pre_attn_scalar`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

from minimax_jax.layout.table import ROWS, Row

Layout: TypeAlias = Literal["hf", "native", "transformers-v5", "maxtext", "maxtext-unscanned"]
"""Layouts by the name that users give them; the first two are the table's own."""

LAYER = "layer"
"""The axis along which layers are stacked."""


@dataclass(frozen=True, kw_only=True)
class Form:
    """How a layout stores a kind of tensor.

    Attributes:
        names: name templates: one, or one for each part; `{layer}` is filled in.
        axes: of each of these tensors.
    """

    names: tuple[str, ...]
    axes: tuple[str, ...]


def _form(name: str, *axes: str) -> Form:
    return Form(names=(name,), axes=axes)


_PARAMS = "params.params."
_DECODER = _PARAMS + "decoder."
_SCANNED, _UNSCANNED = _DECODER + "layers.", _DECODER + "layers_{layer}."
_ATTN, _MOE = _SCANNED + "self_attention.", _SCANNED + "moe_block."

_TRANSFORMERS = {
    "mlp.gate.e_score_correction_bias": _form("model.layers.{layer}.mlp.e_score_correction_bias", "expert"),
    "mlp.experts.gate_and_up_projs": _form(
        "model.layers.{layer}.mlp.experts.gate_up_proj", "expert", "part*inter", "hidden"
    ),
    "mlp.experts.down_projs": _form("model.layers.{layer}.mlp.experts.down_proj", "expert", "hidden", "inter"),
}

_MAXTEXT = {
    "embed_tokens.weight": _form(_PARAMS + "token_embedder.embedding", "vocab", "hidden"),
    "input_layernorm.weight": _form(_SCANNED + "pre_self_attention_layer_norm.scale", "hidden", LAYER),
    "self_attn.q_proj.weight": _form(_ATTN + "query.kernel", "hidden", LAYER, "q_heads", "head_dim"),
    "self_attn.k_proj.weight": _form(_ATTN + "key.kernel", "hidden", LAYER, "kv_heads", "head_dim"),
    "self_attn.v_proj.weight": _form(_ATTN + "value.kernel", "hidden", LAYER, "kv_heads", "head_dim"),
    "self_attn.o_proj.weight": _form(_ATTN + "out.kernel", "q_heads", LAYER, "head_dim", "hidden"),
    "self_attn.q_norm.weight": _form(_ATTN + "query_norm.scale", "q_heads*head_dim", LAYER),
    "self_attn.k_norm.weight": _form(_ATTN + "key_norm.scale", "kv_heads*head_dim", LAYER),
    "post_attention_layernorm.weight": _form(_SCANNED + "post_self_attention_layer_norm.scale", "hidden", LAYER),
    "mlp.gate.weight": _form(_MOE + "gate.kernel", "hidden", LAYER, "expert"),
    "mlp.gate.e_score_correction_bias": _form(_MOE + "gate.bias", "expert", LAYER),
    "mlp.experts.gate_and_up_projs": Form(
        names=(_MOE + "wi_0", _MOE + "wi_1"), axes=("expert", LAYER, "hidden", "inter")
    ),
    "mlp.experts.down_projs": _form(_MOE + "wo", "expert", LAYER, "inter", "hidden"),
    "norm.weight": _form(_DECODER + "decoder_norm.scale", "hidden"),
    "lm_head.weight": _form(_DECODER + "logits_dense.kernel", "hidden", "vocab"),
}


def _unscanned(form: Form) -> Form:
    """The same with a tensor for each layer, as MaxText has it for `scan_layers: false`."""
    names = tuple(name.replace(_SCANNED, _UNSCANNED) for name in form.names)
    return Form(names=names, axes=tuple(axis for axis in form.axes if axis != LAYER))


_DECLARED: Mapping[str, Mapping[str, Form]] = {
    "transformers-v5": _TRANSFORMERS,
    "maxtext": _MAXTEXT,
    "maxtext-unscanned": {kind: _unscanned(form) for kind, form in _MAXTEXT.items()},
}
"""By layout: forms by native name, what stands in front of and within `layers.{layer}.` left out."""

FURTHER: tuple[Layout, ...] = tuple(name for name in get_args(Layout) if name in _DECLARED)
"""Layouts beside the table's own two."""

HOLDING_FP8: tuple[Layout, ...] = ("hf", "native", "transformers-v5")
"""Layouts that have a place for FP8 weights and their block scales."""

NESTED: tuple[Layout, ...] = ("maxtext", "maxtext-unscanned")
"""Layouts whose names are paths in a nested tree, in the files of Orbax."""


def _kind(row: Row) -> str:
    return row.native.split("{layer}.")[-1].removeprefix("model.")


def _same(row: Row) -> Form:
    """The form of a tensor that a layout stores as it is published."""
    return Form(names=(row.native,), axes=row.axes)


FORMS: Mapping[str, Mapping[Row, Form]] = {
    layout: {row: declared.get(_kind(row), _same(row)) for row in ROWS} for layout, declared in _DECLARED.items()
}
"""By further layout: the form of every row of the table."""


def module_names(row: Row, layer: int | None) -> tuple[str, str]:
    """What a kind of tensor is called in NeMo AutoModel's module and in transformers'."""
    (name,) = FORMS["transformers-v5"][row].names
    return (row.native, name) if layer is None else (row.native.format(layer=layer), name.format(layer=layer))
