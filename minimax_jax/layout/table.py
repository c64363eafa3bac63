"""THE table: one row for each kind of tensor in a MiniMax-M2 checkpoint.

This, with `forms` for further layouts, is the only module that knows a key or a shape. Reading, writing, validation,
inspection, sharding, planning and the synthetic checkpoints all derive from it (through `specs`). Another model is
another table.

A row gives the native name (NeMo AutoModel's), the Hugging Face names of its parts, and the axes of ONE part as
Hugging Face stores it. Rows of experts group: over all experts, the parts are concatenated along their first axis and
transposed, so `w1 [inter, hidden]` and `w3 [inter, hidden]` of every expert become
`gate_and_up_projs [expert, hidden, 2*inter]`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from minimax_jax.layout.config import MiniMaxConfig

SCALE_SUFFIX = "_scale_inv"
"""What the name of a weight's block scales has behind the name of the weight, in every layout."""

PREFIX = "model."
"""What published names have in front of everything but `lm_head`; some exports leave it out."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One kind of tensor.

    Attributes:
        native: name template of the native tensor; `{layer}` is filled in.
        parts: name templates of the Hugging Face tensors it is made of; `{layer}` and `{expert}` are filled in.
        axes: logical axis names of one part, as stored by Hugging Face.
        dtype: published dtype, in safetensors' spelling.
        grouped: whether the native tensor groups the parts of all experts.
    """

    native: str
    parts: tuple[str, ...]
    axes: tuple[str, ...]
    dtype: str = "BF16"
    grouped: bool = False

    @property
    def scaled(self) -> bool:
        """Whether the published form is FP8 codes with a `_scale_inv` of one float32 a block."""
        return self.dtype == "F8_E4M3"

    @property
    def native_axes(self) -> tuple[str, ...]:
        """Logical axis names of the native tensor."""
        if not self.grouped:
            return self.axes
        rows, cols = self.axes
        return ("expert", cols, rows if len(self.parts) == 1 else f"{len(self.parts)}*{rows}")

    @property
    def per_layer(self) -> bool:
        """Whether there is one such tensor in each layer."""
        return "{layer}" in self.native


def _same(name: str, axes: tuple[str, ...], dtype: str = "BF16") -> Row:
    return Row(native=name, parts=(name,), axes=axes, dtype=dtype)


_ATTN = PREFIX + "layers.{layer}.self_attn."
_MLP = PREFIX + "layers.{layer}.mlp."
_MOE = PREFIX + "layers.{layer}.block_sparse_moe."
_EXPERT = _MOE + "experts.{expert}."

ROWS = (
    _same(PREFIX + "embed_tokens.weight", ("vocab", "hidden")),
    _same(PREFIX + "layers.{layer}.input_layernorm.weight", ("hidden",)),
    _same(_ATTN + "q_proj.weight", ("q_heads*head_dim", "hidden"), "F8_E4M3"),
    _same(_ATTN + "k_proj.weight", ("kv_heads*head_dim", "hidden"), "F8_E4M3"),
    _same(_ATTN + "v_proj.weight", ("kv_heads*head_dim", "hidden"), "F8_E4M3"),
    _same(_ATTN + "o_proj.weight", ("hidden", "q_heads*head_dim"), "F8_E4M3"),
    _same(_ATTN + "q_norm.weight", ("q_heads*head_dim",)),
    _same(_ATTN + "k_norm.weight", ("kv_heads*head_dim",)),
    _same(PREFIX + "layers.{layer}.post_attention_layernorm.weight", ("hidden",)),
    Row(native=_MLP + "gate.weight", parts=(_MOE + "gate.weight",), axes=("expert", "hidden"), dtype="F32"),
    Row(
        native=_MLP + "gate.e_score_correction_bias",
        parts=(_MOE + "e_score_correction_bias",),
        axes=("expert",),
        dtype="F32",
    ),
    Row(
        native=_MLP + "experts.gate_and_up_projs",
        parts=(_EXPERT + "w1.weight", _EXPERT + "w3.weight"),
        axes=("inter", "hidden"),
        dtype="F8_E4M3",
        grouped=True,
    ),
    Row(
        native=_MLP + "experts.down_projs",
        parts=(_EXPERT + "w2.weight",),
        axes=("hidden", "inter"),
        dtype="F8_E4M3",
        grouped=True,
    ),
    _same(PREFIX + "norm.weight", ("hidden",)),
    _same("lm_head.weight", ("vocab", "hidden")),
)
"""Every kind of tensor, in the order of a forward pass."""

_TIED = ROWS[-1]
"""The output head, which tied checkpoints leave out: it is the embedding."""


def rows(config: MiniMaxConfig) -> tuple[Row, ...]:
    """The rows of one checkpoint: all of them, without the output head where it is tied to the embedding."""
    return tuple(row for row in ROWS if not (config.tie_word_embeddings and row is _TIED))


def axis_sizes(config: MiniMaxConfig) -> dict[str, int]:
    """The size of every logical axis of one part, of the factors of axes, and of stacked layers."""
    return {
        "vocab": config.vocab_size,
        "hidden": config.hidden_size,
        "inter": config.intermediate_size,
        "expert": config.num_local_experts,
        "q_heads*head_dim": config.num_attention_heads * config.head_dim,
        "kv_heads*head_dim": config.num_key_value_heads * config.head_dim,
        "q_heads": config.num_attention_heads,
        "kv_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "layer": config.num_hidden_layers,
    }


class Name(NamedTuple):
    """A name taken apart, be it in the table or not: its kind, and the layer and expert that it speaks of."""

    kind: str
    layer: int | None
    expert: int | None


def dissect(key: str) -> Name:
    """Take a name apart, for messages: `model.layers.7.a.experts.3.w` is of kind `layers.{}.a.experts.{}.w`."""
    pieces = key.removeprefix(PREFIX).split(".")
    numbers: dict[str, int] = {}
    for at, piece in enumerate(pieces):
        if at and piece.isdecimal() and piece.isascii() and len(piece) < 10:
            numbers[pieces[at - 1]] = int(piece)
            pieces[at] = "{}"
    return Name(".".join(pieces), numbers.get("layers") if pieces[0] == "layers" else None, numbers.get("experts"))


MTP_PREFIXES = (PREFIX + "mtp_layers.", PREFIX + "mtp.", "mtp_layers.", "mtp.")
"""What names of multi-token-prediction (MTP) modules begin with, where they do not count on as layers past the last."""


def layer_prefix(layer: int, prefix: str = PREFIX) -> str:
    """What all names in a layer begin with; `prefix` as in `specs`."""
    return f"{prefix}layers.{layer}."


NON_QUANTIZED_KEY_PATTERNS = (
    "input_layernorm.weight",
    "post_attention_layernorm.weight",
    "norm.weight",
    "lm_head.weight",
    "embed_tokens.weight",
    "self_attn.q_norm.weight",
    "self_attn.k_norm.weight",
    "block_sparse_moe.gate.weight",
    "mlp.gate.weight",
)
"""NeMo AutoModel's patterns, for `should_quantize_key`; the conversion itself asks the table's `scaled`."""


def should_quantize_key(key: str) -> bool:
    """Whether a Hugging Face key names a weight that is block-scaled FP8, by NeMo AutoModel's rule.

    The rule works on text, so it also answers for keys that are not in the table.
    """
    if not key.endswith(".weight") or ".lora_" in key:
        return False
    return not any(pattern in key for pattern in NON_QUANTIZED_KEY_PATTERNS)


LORA_SUFFIX = ".lora_{side}.weight"
"""What the name of a module's LoRA factors has behind the name of the module: `{side}` is A or B."""


@dataclass(frozen=True, kw_only=True)
class LoraRow:
    """The LoRA of one kind of grouped tensor: its names in each form, behind `layers.{layer}.`; `{side}` is A or B.

    With `rows` and `cols` those of one part, a factor of rank `rank` has these axes:

    | form | A | B |
    |---|---|---|
    | per expert, for each part | [rank, cols] | [rows, rank] |
    | grouped | [expert, cols, rank] | [expert, rank, parts*rows] |
    | wrapped | [expert*rank, cols] | [parts*rows, rank*expert] |

    Attributes:
        native: native name of the adapted tensor, the `native` of a `Row`.
        grouped: NeMo AutoModel's name of a factor for all experts.
        wrapped: the same for PEFT's `ParamWrapper` of transformers' `mlp.experts`. PEFT nests the wrappers of one
            module in the order of the parameters' names, so that `down_proj` is the outer one.
        hub: names of one expert's factors, for each part, in the published modules.
        nemo: the same in NeMo AutoModel's modules.
    """

    native: str
    grouped: str
    wrapped: str
    hub: tuple[str, ...]
    nemo: tuple[str, ...]


_SPLIT = "mlp.experts.{expert}."
_PUBLISHED = "block_sparse_moe.experts.{expert}."

LORA_ROWS = (
    LoraRow(
        native=_MLP + "experts.gate_and_up_projs",
        grouped="mlp.experts.lora_gate_and_up_{side}",
        wrapped="mlp.experts.base_layer" + LORA_SUFFIX,
        hub=(_PUBLISHED + "w1" + LORA_SUFFIX, _PUBLISHED + "w3" + LORA_SUFFIX),
        nemo=(_SPLIT + "gate_proj" + LORA_SUFFIX, _SPLIT + "up_proj" + LORA_SUFFIX),
    ),
    LoraRow(
        native=_MLP + "experts.down_projs",
        grouped="mlp.experts.lora_down_{side}",
        wrapped="mlp.experts" + LORA_SUFFIX,
        hub=(_PUBLISHED + "w2" + LORA_SUFFIX,),
        nemo=(_SPLIT + "down_proj" + LORA_SUFFIX,),
    ),
)
"""The expert LoRA of each grouped row."""

PEFT_PREFIX = "base_model.model."
"""What PEFT puts in front of the names of the model that it adapts."""

_LAYER = "layers."


def cut_at_layer(key: str) -> tuple[str, str, str]:
    """`...layers.7.name` as `...layers.7.`, `7` and `name`; other names whole, behind two empty strings."""
    before, mark, after = key.rpartition(_LAYER)
    layer, dot, name = after.partition(".")
    if not mark or (before and not before.endswith(".")):
        return "", "", key
    return before + mark + layer + dot, layer, name


def in_layer(name: str, layer: int) -> str:
    """The name of something in a layer, without any prefix; `name` stands behind `layers.{layer}.`."""
    return f"{_LAYER}{layer}.{name}"


def lora_of(weight: str) -> str:
    """Template of the names of the LoRA factors of a matrix."""
    return weight.removesuffix(".weight") + LORA_SUFFIX


def is_expert_lora(key: str) -> bool:
    """Whether a name, known or not, speaks of the LoRA of experts."""
    return ".lora_" in key and "experts." in key
