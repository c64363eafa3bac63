"""What a key stands for, under any prefix: look-ups in the layout, for state dicts that may be partial.

Every name comes from `minimax_jax.layout`. What stands in front of `layers.` is the prefix: `model.`, nothing, or
whatever a wrapper put there. Names without a layer are the same in both layouts and need no look-up.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from minimax_jax.errors import ConfigError, Problem, raise_if
from minimax_jax.layout.config import DEFAULT_BLOCK, MiniMaxConfig
from minimax_jax.layout.specs import Entry, Place, Specs, specs
from minimax_jax.layout.table import ROWS

GATED_ACTIVATIONS = ("swiglu", "swigluoai", "quick_geglu", "geglu")
"""Values of NeMo's `expert_activation` that have a gate beside the up projection, as MiniMax-M2 has."""

EXPERT_ROWS = tuple(row for row in ROWS if row.grouped)

_LAYER, _EXPERT = "{layer}", "{expert}"


def _path(template: str, end: str | None) -> tuple[str, ...]:
    """The steps of a name template between its layer and `end`."""
    steps = template.split(".")
    return tuple(steps[steps.index(_LAYER) + 1 : steps.index(end) if end else -1])


(LAYERS,) = {steps[steps.index(_LAYER) - 1] for row in EXPERT_ROWS if (steps := row.native.split("."))}
"""The step before the number of a layer."""

(HF_EXPERTS,) = {_path(part, _EXPERT) for row in EXPERT_ROWS for part in row.parts}
"""The steps from a layer to its experts, in Hugging Face names."""

(NATIVE_EXPERTS,) = {_path(row.native, None) for row in EXPERT_ROWS}
"""The same in native names."""

_PROJECTIONS = {
    name: (row.native.rpartition(".")[2], part)
    for row, names in zip(EXPERT_ROWS, (("gate_proj.weight", "up_proj.weight"), ("down_proj.weight",)), strict=True)
    for part, name in enumerate(names)
}
"""Native tensor and part of the names, half way between the layouts, that NeMo gives the matrices of one expert."""


LORA = ".lora_"
"""What the names of LoRA tensors have in them."""


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """What NeMo's `config` and `moe_config` say of the experts; None where neither says.

    Attributes:
        experts: experts of a layer.
        inter: intermediate size of an expert.
        hidden: hidden size.
        layers: layers of the whole model.
        block: rows and columns of one FP8 block.
    """

    experts: int
    inter: int
    hidden: int | None
    layers: int | None
    block: tuple[int, int]

    @classmethod
    def of(cls, config: Any, moe_config: Any) -> Sizes:
        """Read them by attribute, so that NeMo's own objects and plain namespaces both do.

        Raises:
            ConfigError: experts with a bias or without a gate, which MiniMax-M2 does not have.
        """
        raise_if(_unsupported(moe_config), ConfigError)
        quantization = getattr(config, "quantization_config", None)
        block = quantization.get("weight_block_size") if isinstance(quantization, dict) else None
        return cls(
            experts=moe_config.n_routed_experts,
            inter=moe_config.moe_inter_dim,
            hidden=getattr(config, "hidden_size", None) or getattr(moe_config, "dim", None),
            layers=getattr(config, "num_hidden_layers", None),
            block=tuple(block) if block else DEFAULT_BLOCK,
        )

    def layout(self, layers: int) -> MiniMaxConfig:
        """A config for look-ups of names in layers; sizes that no such name depends on are 1, or the least allowed."""
        return MiniMaxConfig(
            hidden_size=self.hidden or 1,
            intermediate_size=self.inter,
            num_hidden_layers=layers,
            num_local_experts=self.experts,
            num_experts_per_tok=1,
            num_attention_heads=1,
            num_key_value_heads=1,
            head_dim=2,
            rotary_dim=2,
            vocab_size=1,
            weight_block_size=self.block,
        )


class Names:
    """Look-ups for one state dict; sizes that `sizes` lacks are those of its keys and tensors."""

    def __init__(self, sizes: Sizes, tensors: Mapping[str, Any]):
        layers = sizes.layers or 1 + max(map(_layer_of, tensors), default=0)
        self._config = sizes.layout(layers)
        self._specs: dict[str, Specs] = {}
        if sizes.hidden is None:
            found = (self._hidden_of(key, tensor) for key, tensor in tensors.items())
            self._config = self._config.replace(hidden_size=next(filter(None, found), 1))
            self._specs.clear()

    @property
    def config(self) -> MiniMaxConfig:
        """Sizes of experts, and what names depend on; of what they do not, see `Sizes.layout`."""
        return self._config

    @property
    def expected(self) -> str:
        """What names of experts' weights look like, for messages."""
        parts = ", ".join(part.split(f"{_EXPERT}.")[1] for row in EXPERT_ROWS for part in row.parts)
        config = self._config
        path = ".".join(HF_EXPERTS)
        return f"{path}.N.({parts}), N below {config.num_local_experts}, in {config.num_hidden_layers} layers"

    def hf(self, key: str) -> Place | None:
        """Where a Hugging Face tensor of a layer goes."""
        table = self._table(key)
        return None if table is None else table.places.get(key)

    def native(self, key: str) -> Entry | None:
        """The entry of a native tensor of a layer."""
        table = self._table(key)
        return None if table is None else table.by_native.get(key)

    def hf_to_native(self, key: str) -> str:
        """The inverse of `native_to_hf`."""
        place = self.hf(key)
        if place is None or place.is_scale:
            return key
        if not place.entry.row.grouped:
            return place.entry.native
        module, _, leaf = place.entry.native.rpartition(".")
        (projection,) = (name for name, which in _PROJECTIONS.items() if which == (leaf, place.part))
        return f"{module}.{place.expert}.{projection}"

    def native_to_hf(self, key: str) -> str:
        """The Hugging Face name of a native tensor that does not group, or of a matrix with NeMo's half-way name."""
        entry = self.native(key)
        if entry is not None and not entry.row.grouped:
            return entry.keys[0][0]
        return self._halfway_to_hf(key) or key

    def _halfway_to_hf(self, key: str) -> str | None:
        module, *rest = key.rsplit(".", 3)
        if len(rest) < 3 or ".".join(rest[1:]) not in _PROJECTIONS:
            return None
        leaf, part = _PROJECTIONS[".".join(rest[1:])]
        entry = self.native(f"{module}.{leaf}")
        if entry is None or not rest[0].isdecimal() or int(rest[0]) >= entry.experts:
            return None
        return entry.keys[int(rest[0])][part]

    def _hidden_of(self, key: str, tensor: Any) -> int | None:
        place, entry = self.hf(key), self.native(key)
        if place is not None and place.entry.row.grouped and not place.is_scale:
            axes = place.entry.row.axes
        elif entry is not None and entry.row.grouped:
            axes = entry.row.native_axes
        else:
            return None
        shape = getattr(tensor, "shape", ())
        return int(shape[axes.index("hidden")]) if len(shape) == len(axes) else None

    def _table(self, key: str) -> Specs | None:
        prefix, steps = _from_layer(key)
        if not steps:
            return None
        if prefix not in self._specs:
            self._specs[prefix] = specs(self._config, prefix)
        return self._specs[prefix]


def names_an_expert(key: str) -> bool:
    """Whether a key has the number of an expert where one of the layouts has its experts."""
    _, steps = _from_layer(key)
    return any(
        tuple(steps[1 : 1 + len(path)]) == path and len(steps) > 1 + len(path) and steps[1 + len(path)].isdecimal()
        for path in (HF_EXPERTS, NATIVE_EXPERTS)
    )


def _from_layer(key: str) -> tuple[str, list[str]]:
    """The prefix of a key, and its steps from the number of its layer on; no steps where there is no such number."""
    steps = key.split(".")
    at = steps.index(LAYERS) if LAYERS in steps else len(steps)
    if at + 1 >= len(steps) or not steps[at + 1].isdecimal():
        return key, []
    return "".join(f"{step}." for step in steps[:at]), steps[at + 1 :]


def _layer_of(key: str) -> int:
    _, steps = _from_layer(key)
    return int(steps[0]) if steps else 0


def _unsupported(moe_config: Any) -> Iterator[Problem]:
    if getattr(moe_config, "expert_bias", False):
        yield Problem(what="experts of MiniMax-M2 have no bias", key="expert_bias", expected="False", got="True")
    activation = getattr(moe_config, "expert_activation", GATED_ACTIVATIONS[0])
    if activation not in GATED_ACTIVATIONS:
        expected = " or ".join(GATED_ACTIVATIONS)
        yield Problem(
            what="experts of MiniMax-M2 are gated", key="expert_activation", expected=expected, got=repr(activation)
        )
