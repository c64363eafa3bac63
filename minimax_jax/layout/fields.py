"""The fields of `MiniMaxConfig`: what values each may have, and which values would contradict each other."""

from __future__ import annotations

import math
import reprlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from minimax_jax.errors import Problem

MODULES_TO_NOT_CONVERT = ("gate", "e_score_correction_bias", "lm_head")
"""The published list of modules that the quantisation left alone."""

_MOST_EXPERTS = 2**18
"""Experts over all layers; a config that asks for more is damaged or hostile (the published models have 15,872)."""

_REPR = reprlib.Repr()
_REPR.maxstring = 80


@dataclass(frozen=True, kw_only=True)
class Kind:
    """A kind of value: how a message calls it, and which values are of it."""

    text: str
    accepts: Callable[[Any], bool]


@dataclass(frozen=True, kw_only=True)
class _Rule:
    """A field and what it must be in view of another one."""

    field: str
    other: str
    holds: Callable[[int, int], bool]
    expected: str


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value < 2**53


def _is_number(value: Any) -> bool:
    return 0 < value < math.inf if isinstance(value, float) else _is_size(value)


def _is_block(value: Any) -> bool:
    return value is None or (isinstance(value, tuple) and len(value) == 2 and all(map(_is_size, value)))


def _is_names(value: Any) -> bool:
    return isinstance(value, tuple) and all(isinstance(name, str) for name in value)


_SIZE = Kind(text="a positive integer", accepts=_is_size)
_NUMBER = Kind(text="a positive number", accepts=_is_number)
_FLAG = Kind(text="true or false", accepts=lambda value: isinstance(value, bool))
_DTYPE = Kind(text="bfloat16, float32 or float16", accepts=lambda value: value in ("bfloat16", "float32", "float16"))
_BLOCK = Kind(text="two positive integers, such as [128, 128]", accepts=_is_block)
_NAMES = Kind(text="a list of names", accepts=_is_names)

FIELDS: Mapping[str, Kind] = {
    "hidden_size": _SIZE,
    "intermediate_size": _SIZE,
    "num_hidden_layers": _SIZE,
    "num_local_experts": _SIZE,
    "num_experts_per_tok": _SIZE,
    "num_attention_heads": _SIZE,
    "num_key_value_heads": _SIZE,
    "head_dim": _SIZE,
    "rotary_dim": _SIZE,
    "vocab_size": _SIZE,
    "max_position_embeddings": _SIZE,
    "rope_theta": _NUMBER,
    "rms_norm_eps": _NUMBER,
    "tie_word_embeddings": _FLAG,
    "dtype": _DTYPE,
    "weight_block_size": _BLOCK,
    "modules_to_not_convert": _NAMES,
}
"""Every field but `extra`."""

REQUIRED = (
    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_local_experts", "num_experts_per_tok"),
    *("num_attention_heads", "num_key_value_heads", "head_dim", "vocab_size"),
)
"""Fields that nothing else can stand in for; without a word on RoPE's dims, `rotary_dim` is `head_dim`."""

_RULES = (
    _Rule(
        field="num_key_value_heads",
        other="num_attention_heads",
        holds=lambda kv_heads, heads: heads % kv_heads == 0,
        expected="a divisor of num_attention_heads = {other}",
    ),
    _Rule(
        field="rotary_dim",
        other="head_dim",
        holds=lambda rotary_dim, head_dim: rotary_dim <= head_dim and rotary_dim % 2 == 0,
        expected="an even number up to head_dim = {other}",
    ),
    _Rule(
        field="num_experts_per_tok",
        other="num_local_experts",
        holds=lambda chosen, experts: chosen <= experts,
        expected="at most num_local_experts = {other}",
    ),
    _Rule(
        field="num_local_experts",
        other="num_hidden_layers",
        holds=lambda experts, layers: experts * layers <= _MOST_EXPERTS,
        expected=f"a plausible number: at most {_MOST_EXPERTS} over num_hidden_layers = {{other}}",
    ),
)


def problems(values: Mapping[str, Any]) -> Iterator[Problem]:
    """What is wrong with values of fields: those of a wrong kind, then good ones that contradict each other.

    Args:
        values: by field name; fields that are absent are not looked at.
    """
    wrong = [name for name, value in values.items() if not FIELDS[name].accepts(value)]
    for name in wrong:
        yield Problem(what=f"{name} must be {FIELDS[name].text}", key=name, got=shown(values[name]))
    good = values.keys() - wrong
    for rule in _RULES:
        if not good >= {rule.field, rule.other}:
            continue
        value, other = values[rule.field], values[rule.other]
        if not rule.holds(value, other):
            expected = rule.expected.format(other=other)
            yield Problem(what=f"impossible {rule.field}", key=rule.field, expected=expected, got=str(value))


def shown(value: Any) -> str:
    """`value` as it may stand in a message: however large or deep it is, the text is short."""
    return _REPR.repr(value)
