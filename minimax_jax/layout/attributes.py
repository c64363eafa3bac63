"""The attributes of config.json, in both published forms: how they become fields of `MiniMaxConfig`, and back.

Every attribute is in one of three tables: those that fields are read from, those that have a meaning of which this
library supports certain values alone, and those that change no tensor and no logit. Anything else is refused.

Collected from the published config.json of M2, M2.1, M2.5 and M2.7, from transformers' `MiniMaxM2Config` and its FP8
quantizer, and from what vLLM and SGLang look up. `null` means absent, as it does to all of them.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Collection, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from minimax_jax.errors import ConfigError, Problem, argument, raise_if
from minimax_jax.layout import fields
from minimax_jax.layout.fields import FIELDS, REQUIRED, shown

if TYPE_CHECKING:
    from minimax_jax.layout.config import MiniMaxConfig

_ROPE, _FP8 = "rope_parameters", "quantization_config"
"""Attributes that are objects. What stands in them is named with a dot, such as `rope_parameters.rope_theta`."""

_SOURCES: Mapping[str, tuple[str, ...]] = {
    **{field: (field,) for field in FIELDS},
    "dtype": ("dtype", "torch_dtype"),
    "rope_theta": ("rope_theta", f"{_ROPE}.rope_theta"),
    "weight_block_size": (f"{_FP8}.weight_block_size",),
    "modules_to_not_convert": (f"{_FP8}.modules_to_not_convert",),
}
"""By field: the attributes that may give it. Where several do, they must agree."""

_FACTORS = ("partial_rotary_factor", f"{_ROPE}.partial_rotary_factor")
"""Attributes that give `rotary_dim` as a part of `head_dim`."""

_SUPPORTED: Mapping[str, tuple[Any, ...]] = {
    "architectures": (["MiniMaxM2ForCausalLM"],),
    "attention_bias": (False,),
    "attn_window_size": (),
    "hidden_act": ("silu",),
    "is_encoder_decoder": (False,),
    "layernorm_full_attention_beta": (1.0,),
    "layernorm_linear_attention_beta": (1.0,),
    "layernorm_mlp_beta": (1.0,),
    "model_type": ("minimax_m2", "minimax"),
    "num_expert_group": (1,),
    "qk_norm_type": ("per_layer",),
    "rope_scaling": (),
    "routed_scaling_factor": (1.0,),
    "scoring_func": ("sigmoid",),
    "shared_intermediate_size": (0,),
    "sliding_window": (),
    "topk_group": (1,),
    "use_qk_norm": (True,),
    "use_routing_bias": (True,),
    "use_sliding_window": (False,),
    f"{_ROPE}.rope_type": ("default",),
    f"{_ROPE}.type": ("default",),
    f"{_FP8}.activation_scheme": ("dynamic",),
    f"{_FP8}.dequantize": (False,),
    f"{_FP8}.expert_dtype": ("fp8",),
    f"{_FP8}.fmt": ("float8_e4m3fn", "e4m3"),
    f"{_FP8}.modules_to_convert": (),
    f"{_FP8}.quant_method": ("fp8",),
    f"{_FP8}.scale_fmt": ("float",),
}
"""Attributes with a meaning, and their supported values: the first is what absence means; none is null alone."""

_ATTENTION = "attn_type_list"
"""One number a layer; 1 is full attention, the only supported kind."""

MTP_COUNTS = ("num_mtp_modules", "num_nextn_predict_layers")
"""Attributes that say how many MTP modules there are: MiniMax's, and that of other families, which exporters copy."""

_DEAD = (
    *("_name_or_path", "auto_map", "transformers_version"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "max_model_len", "use_cache", "return_dict"),
    *("attention_dropout", "chunk_size_feed_forward", "initializer_range", "problem_type", "id2label", "label2id"),
    *("output_attentions", "output_hidden_states", "output_router_logits"),
    *("router_aux_loss_coef", "router_jitter_noise", "use_grouped_topk", "shared_moe_mode"),
    *("mlp_intermediate_size", "swa_rope_theta"),
    *("use_mtp", *MTP_COUNTS, "mtp_transformer_layers"),
)
"""Attributes that change no tensor and no logit: dead, or about training, tokens, or MTP modules never published."""

_CONSTANT = (
    *("architectures", "model_type", "hidden_act"),
    *("scoring_func", "use_routing_bias", "use_qk_norm", "qk_norm_type", "shared_intermediate_size"),
)
"""Supported attributes that are always written; vLLM and SGLang look up the last five, which the v5 form leaves out."""

_READ = {*_FACTORS, *(name for names in _SOURCES.values() for name in names)}
_KNOWN = {*_READ, *_SUPPORTED, *_DEAD, _ATTENTION}
_OWN = {*_READ, *_CONSTANT, _ATTENTION, _ROPE, _FP8}
"""What `read` and `write` see to; every other attribute is kept in `extra`."""

_MOST_NESTED = 8


def read(raw: Mapping[str, Any], *, file: str | None, ignore: Collection[str]) -> dict[str, Any]:
    """The keyword arguments of `MiniMaxConfig` that a config.json gives; `extra` is a copy.

    Raises:
        ConfigError: everything that is wrong with it.
    """
    given = _flattened(raw)
    claims = {field: _claims(field, given) for field in FIELDS}
    values = {field: next(iter(claim.values())) for field, claim in claims.items() if claim}
    if FIELDS["head_dim"].accepts(values.get("head_dim")):
        values.setdefault("rotary_dim", values["head_dim"])
    extra = {name: value for name, value in raw.items() if name not in _OWN}
    problems = [
        *_missing(raw, given),
        *_unknown(given, ignore),
        *fields.problems(values),
        *_disagreements(claims),
        *_unsupported(given, values.get("num_hidden_layers")),
        *_unwritable(extra),
    ]
    raise_if((dataclasses.replace(problem, file=file) for problem in problems), ConfigError)
    numbers: dict[str, float] = {
        field: float(values[field]) for field in ("rope_theta", "rms_norm_eps") if field in values
    }
    return {**values, **numbers, "extra": copy.deepcopy(extra)}


def write(config: MiniMaxConfig) -> dict[str, Any]:
    """The union of both forms of config.json, as a copy; `quantization_config` is there exactly for FP8."""
    own = {field: getattr(config, field) for field, sources in _SOURCES.items() if field in sources}
    written = {
        **copy.deepcopy(dict(config.extra)),
        **{name: _first_supported(name) for name in _CONSTANT},
        **own,
        "torch_dtype": config.dtype,
        _ATTENTION: [1] * config.num_hidden_layers,
        _ROPE: {
            "rope_type": "default",
            "rope_theta": config.rope_theta,
            "partial_rotary_factor": _factor(config.rotary_dim, config.head_dim),
        },
    }
    if config.weight_block_size is not None:
        written[_FP8] = {
            **{name: _first_supported(f"{_FP8}.{name}") for name in ("quant_method", "fmt", "activation_scheme")},
            "weight_block_size": list(config.weight_block_size),
            "modules_to_not_convert": list(config.modules_to_not_convert),
        }
    return written


def mtp_modules(extra: Mapping[str, Any]) -> int:
    """How many MTP modules the attributes announce; 0 where they say that there are none, or nothing sensible."""
    counts = [count for name in MTP_COUNTS if type(count := extra.get(name)) is int]
    return 0 if extra.get("use_mtp") is False else max(0, *counts, 0)


def _flattened(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Attributes that are not null by name, those within objects by dotted name."""
    given: dict[str, Any] = {}
    for name, value in raw.items():
        opened = name in (_ROPE, _FP8) and isinstance(value, Mapping)
        given |= {f"{name}.{inner}": value[inner] for inner in value} if opened else {name: value}
    return {name: value for name, value in given.items() if value is not None}


def _claims(field: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """What each attribute says that the field is."""
    claims = {name: given[name] for name in _SOURCES[field] if name in given}
    if field == "rotary_dim" and FIELDS["head_dim"].accepts(given.get("head_dim")):
        claims |= {name: _rotary_dim(given[name], given["head_dim"]) for name in _FACTORS if name in given}
    return {name: tuple(value) if isinstance(value, list) else value for name, value in claims.items()}


def _rotary_dim(factor: Any, head_dim: int) -> Any:
    """`int(head_dim * factor)`, as transformers computes it; nonsense is passed on, for the check of the field."""
    return int(head_dim * factor) if type(factor) in (int, float) and 0 < factor <= 1 else f"{shown(factor)} x head_dim"


def _factor(rotary_dim: int, head_dim: int) -> float:
    """The inverse of `_rotary_dim`: the first float at or above the quotient whose product does not round down."""
    factor = rotary_dim / head_dim
    while int(head_dim * factor) < rotary_dim:
        factor = math.nextafter(factor, math.inf)
    return factor


def _first_supported(name: str) -> Any:
    return copy.copy(_SUPPORTED[name][0])


def _missing(raw: Mapping[str, Any], given: Mapping[str, Any]) -> Iterator[Problem]:
    quantized = raw.get(_FP8) is not None
    for name in (*REQUIRED, *((f"{_FP8}.quant_method", f"{_FP8}.weight_block_size") if quantized else ())):
        if name not in given:
            yield Problem(what="missing attribute", key=name)


def _unknown(given: Mapping[str, Any], ignore: Collection[str]) -> Iterator[Problem]:
    for name in given:
        if name in (_ROPE, _FP8):
            yield Problem(what=f"{name} must be an object", key=name, got=shown(given[name]))
        elif name not in _KNOWN and name not in ignore:
            remedy = f"if it changes no tensor, name it in {argument('ignore')}"
            if name == "num_experts":
                remedy = "MiniMax-M2 calls it num_local_experts"
            yield Problem(what="unknown attribute", key=_label(name), got=shown(given[name]), remedy=remedy)


def _disagreements(claims: Mapping[str, Mapping[str, Any]]) -> Iterator[Problem]:
    for field, claim in claims.items():
        first, *others = claim.values() or [None]
        if any(other != first for other in others):
            got = ", ".join(f"{shown(value)} by {name}" for name, value in claim.items())
            yield Problem(what=f"attributes disagree about {field}", key=field, expected="one value", got=got)


def _unsupported(given: Mapping[str, Any], layers: Any) -> Iterator[Problem]:
    for name, supported in _SUPPORTED.items():
        if name in given and not any(_equal(given[name], value) for value in supported):
            expected = " or ".join(map(shown, supported)) or "null"
            yield Problem(what=f"unsupported {name}", key=name, expected=expected, got=shown(given[name]))
    kinds = given.get(_ATTENTION, [1])
    full = isinstance(kinds, list) and all(kind == 1 for kind in kinds)
    if not full or (_ATTENTION in given and len(kinds) != layers):
        expected = f"{layers} times 1: full attention in every layer"
        yield Problem(what=f"unsupported {_ATTENTION}", key=_ATTENTION, expected=expected, got=shown(kinds))


def _equal(value: Any, supported: Any) -> bool:
    """Equality as JSON has it, where `true` is not 1."""
    return bool(value == supported) and isinstance(value, bool) == isinstance(supported, bool)


def _unwritable(extra: Mapping[str, Any]) -> Iterator[Problem]:
    for name, value in extra.items():
        if not _is_plain({name: value}):
            yield Problem(what="not a value that JSON can hold", key=_label(name), got=shown(value))


def _is_plain(value: Any, depth: int = _MOST_NESTED) -> bool:
    """Whether JSON can hold `value`: finite numbers, sound text, and not nested without end."""
    if isinstance(value, Mapping):
        return depth > 0 and all(_is_plain(name, 0) and _is_plain(value[name], depth - 1) for name in value)
    if isinstance(value, (list, tuple)):
        return depth > 0 and all(_is_plain(item, depth - 1) for item in value)
    if isinstance(value, str):
        return not any("\ud800" <= char <= "\udfff" for char in value)
    return value is None or isinstance(value, int) or (isinstance(value, float) and math.isfinite(value))


def _label(name: Any) -> str:
    return name if isinstance(name, str) and name.isprintable() and len(name) <= 80 else shown(name)
