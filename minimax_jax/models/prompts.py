"""Prompts: padding a ragged batch, and the checks before any are run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from minimax_jax.errors import JobError, Problem, raise_if
from minimax_jax.layout.config import MiniMaxConfig

Ids: TypeAlias = npt.NDArray[np.int32]

_STRANGE = "ids that are not in the vocabulary"
_SHOWN = 5


def pad_prompts(prompts: Sequence[Sequence[int]], *, multiple: int = 1, pad: int = 0) -> tuple[Ids, Ids]:
    """Prompts of different lengths as tokens [batch, time], padded on the right, and their lengths [batch].

    Args:
        prompts: ids of each prompt.
        multiple: `time` is rounded up to a multiple of it, so that few widths are compiled.
        pad: the id of the padding.

    Raises:
        JobError: ids that no int32 holds.
    """
    raise_if(_too_wide(prompts), JobError)
    lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    time = -(-max(lengths, default=0) // multiple) * multiple
    tokens = np.full((len(prompts), time), pad, np.int32)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt)] = prompt
    return tokens, lengths


def _too_wide(prompts: Sequence[Sequence[int]]) -> Iterator[Problem]:
    held = np.iinfo(np.int32)
    wide = sorted({token for prompt in prompts for token in prompt if not held.min <= token <= held.max})
    if wide:
        yield Problem(what=_STRANGE, expected=f"ids below {held.max}", got=_listed(wide))


def _listed(ids: Sequence[int]) -> str:
    return ", ".join(map(str, ids[:_SHOWN])) + (f" and {len(ids) - _SHOWN:,} more" if len(ids) > _SHOWN else "")


def prompt_problems(
    tokens: npt.NDArray[Any], lengths: npt.NDArray[Any], room: int, config: MiniMaxConfig
) -> Iterator[Problem]:
    """What keeps prompts, with `room` tokens behind each, from being run."""
    if tokens.ndim != 2 or tokens.dtype.kind not in "iu" or not tokens.size:
        got = f"{tokens.dtype}{list(tokens.shape)}"
        yield Problem(what="not a batch of prompts", expected="integers [batch, time]", got=got)
        return
    if lengths.shape != tokens.shape[:1] or lengths.dtype.kind not in "iu":
        expected, got = f"integers [{tokens.shape[0]}]", f"{lengths.dtype}{list(lengths.shape)}"
        yield Problem(what="not the lengths of these prompts", expected=expected, got=got)
        return
    if lengths.min() < 1 or lengths.max() > tokens.shape[1]:
        expected, got = f"1 to {tokens.shape[1]}", f"{lengths.min()} to {lengths.max()}"
        yield Problem(what="prompts without tokens, or longer than their row", expected=expected, got=got)
    strange = np.unique(tokens[(tokens < 0) | (tokens >= config.vocab_size)]).tolist()
    if strange:
        yield Problem(what=_STRANGE, expected=f"ids from 0 to {config.vocab_size - 1}", got=_listed(strange))
    if room < 1 or lengths.max() + room > config.max_position_embeddings:
        expected = f"at least 1, and no more than {config.max_position_embeddings} with the prompt"
        got = f"{room} behind {lengths.max()}"
        yield Problem(what="max_new_tokens is out of range", key="max_new_tokens", expected=expected, got=got)


def sampling_problems(temperature: float, top_k: int | None, top_p: float | None, seeded: bool) -> Iterator[Problem]:
    """What keeps these from being the settings of a `Sampler`."""
    if not 0 <= temperature < np.inf:
        yield Problem(what="temperature is out of range", key="temperature", expected=">= 0", got=str(temperature))
    if top_k is not None and top_k < 1:
        yield Problem(what="top_k is out of range", key="top_k", expected=">= 1", got=str(top_k))
    if top_p is not None and not 0 < top_p <= 1:
        yield Problem(what="top_p is out of range", key="top_p", expected="above 0, up to 1", got=str(top_p))
    if temperature and not seeded:
        yield Problem(what="sampling needs a random key", key="key", remedy="pass key=jax.random.key(seed)")
    if not temperature and (top_k is not None or top_p is not None):
        remedy = "set a temperature above 0"
        yield Problem(what="top_k and top_p mean nothing without sampling", key="temperature", got="0", remedy=remedy)
