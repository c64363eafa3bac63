"""Names beside those of the model: MTP modules that config.json announces, and what a caller says to leave out."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Set

from minimax_jax.errors import LayoutError, Problem, raise_if
from minimax_jax.layout.arrangement import stored_names
from minimax_jax.layout.check import table_of
from minimax_jax.layout.config import MiniMaxConfig
from minimax_jax.layout.forms import FORMS
from minimax_jax.layout.specs import Specs
from minimax_jax.layout.table import MTP_PREFIXES, SCALE_SUFFIX, layer_prefix


def left_out(keys: Collection[str], config: MiniMaxConfig, named: Collection[str] = ()) -> dict[str, list[str]]:
    """The names that are to be left out, by what they begin with. A name of the model's own is never among them.

    Beside what is named, those are modules for multi-token prediction (MTP), where config.json announces some: names
    that speak of MTP, and those of layers that count on past the last, as vLLM and SGLang number them. Such a layer is
    one of MTP only if it holds a tensor that no layer of the model has (`eh_proj`, `enorm`, ...): a config.json with
    too few layers must not pass for one.

    Args:
        keys: of all stored tensors.
        config: the checkpoint's config.
        named: what the names to leave out begin with, in whole parts: `model.mtp` is not the beginning of
            `model.mtp_layers.0`.

    Raises:
        LayoutError: something named is the beginning of names of the model.
    """
    table = table_of(keys, config)
    own = _own_names(table)
    unknown = [key for key in keys if key not in own]
    asked = tuple(f"{name.rstrip('.')}." if name.strip(".") else "" for name in named)
    raise_if(_wanted(asked, own), LayoutError)
    prefixes = (*asked, *_announced(unknown, table, own, config.mtp_modules))
    found: dict[str, list[str]] = {}
    for key in unknown:
        prefix = next((prefix for prefix in prefixes if f"{key}.".startswith(prefix)), None)
        if prefix is not None:
            found.setdefault(prefix, []).append(key)
    return found


def _own_names(table: Specs) -> Set[str]:
    """The names of all tensors of the model, in any layout."""
    further = (name for form in FORMS for entry in table.entries for name in stored_names(entry, form))
    stored = {*table.by_native, *further}
    return {*table.places, *stored, *(name + SCALE_SUFFIX for name in stored)}


def _wanted(asked: Iterable[str], names: Set[str]) -> Iterator[Problem]:
    for prefix in asked:
        own = min((name for name in names if f"{name}.".startswith(prefix)), default=None)
        if own is not None:
            what, got = "what is to be left out belongs to the model", f"{prefix or 'nothing'} as the beginning"
            yield Problem(what=what, key=own, expected="the beginning of other names alone", got=got)


def _announced(unknown: Collection[str], table: Specs, own: Set[str], modules: int) -> Iterator[str]:
    if modules:
        yield from MTP_PREFIXES
    first, known = table.config.num_hidden_layers, layer_prefix(0, table.prefix)
    for layer in range(first, first + min(modules, len(unknown))):
        prefix = layer_prefix(layer, table.prefix)
        behind = (key.removeprefix(prefix) for key in unknown if key.startswith(prefix))
        if any(known + name not in own for name in behind):
            yield prefix
