"""Which tensors a LoRA adapter holds: names looked up, then shapes, ranks and dtypes checked. No arrays."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from minimax_jax.dtypes import FLOATS, NAMES
from minimax_jax.errors import Problem
from minimax_jax.layout.config import MiniMaxConfig
from minimax_jax.layout.specs import specs
from minimax_jax.layout.table import (
    LORA_ROWS,
    PREFIX,
    ROWS,
    LoraRow,
    axis_sizes,
    cut_at_layer,
    in_layer,
    is_expert_lora,
    lora_of,
)

Form = Literal["split", "grouped", "wrapped", "legacy"]
"""Per expert; grouped; PEFT's ParamWrapper; the same as PEFT before 0.19.1 laid it out, under the same names."""

Side = Literal["A", "B"]

SIDES: tuple[Side, Side] = ("A", "B")

_ROWS = {row.native: row for row in ROWS}


class Factor(NamedTuple):
    """One factor of the LoRA of one grouped tensor: what stands in front of its names, its row, and A or B.

    Of the legacy form it is the factor that the name speaks of, which is the other one.
    """

    scope: str
    row: LoraRow
    side: Side

    @property
    def parts(self) -> int:
        """How many matrices of an expert the adapted tensor is made of."""
        return len(self.row.hub)

    @property
    def other(self) -> Factor:
        """The other factor."""
        return self._replace(side="B" if self.side == "A" else "A")

    def key(self, template: str, expert: int = 0) -> str:
        """Its name by one of its row's templates."""
        return self.scope + _filled(template, self.side, expert)


class Place(NamedTuple):
    """Where a tensor goes in its factor; both 0 where one tensor holds all of it."""

    expert: int
    part: int


@dataclass(frozen=True, kw_only=True, eq=False)
class Found:
    """The names of a tree, sorted.

    Attributes:
        config: the config of the adapted checkpoint.
        form: whose names were looked for.
        factors: the names of that form.
        rest: all other names; expert LoRA of another form is among them.
        problems: what is wrong with the names.
    """

    config: MiniMaxConfig
    form: Form
    factors: dict[Factor, dict[Place, str]] = field(default_factory=dict)
    rest: list[str] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)


def find(tree: Mapping[str, Any], config: MiniMaxConfig, form: Form, *, partial: bool = False) -> Found:
    """Sort the names of a tree.

    Args:
        tree: whose names.
        config: the config of the adapted checkpoint.
        form: whose names to look for.
        partial: allow a factor without the other one.
    """
    found = Found(config=config, form=form)
    slots, layers = _slots(config), {str(layer) for layer in range(config.num_hidden_layers)}
    for key in tree:
        scope, layer, name = cut_at_layer(key)
        slot = slots.get(name) if layer in layers else None
        if slot is not None and slot.form == form:
            places = found.factors.setdefault(Factor(scope, slot.row, slot.side), {})
            if slot.place in places:
                found.problems.append(Problem(what="given twice", key=key, got=f"{places[slot.place]} as well"))
            places[slot.place] = key
            continue
        found.rest.append(key)
        if slot is None and is_expert_lora(key):
            expected = f"LoRA of one of {config.num_hidden_layers} layers and {config.num_local_experts} experts"
            found.problems.append(Problem(what="unexpected tensor", key=key, expected=expected))
    found.problems.extend(_missing(found, slots, partial))
    return found


def problems(found: Found, tree: Mapping[str, Any], form: Form) -> Iterator[Problem]:
    """What is wrong with the names that were found, and with their shapes, ranks and dtypes for this form."""
    yield from found.problems
    ranks: dict[tuple[str, LoraRow], dict[int, str]] = {}
    for factor, places in found.factors.items():
        dtypes = {tree[key].dtype: key for key in places.values()}
        if len(dtypes) > 1 or NAMES.get(next(iter(dtypes))) not in FLOATS:
            got = ", ".join(f"{dtype} ({key})" for dtype, key in dtypes.items())
            yield Problem(what="wrong dtype", key=next(iter(dtypes.values())), expected="one float dtype", got=got)
        for key in places.values():
            rank, fitting = _fit(found.config, factor, form, tree[key].shape)
            if not fitting:
                expected = f"{list(shape(found.config, factor, form, 1))} times a rank"
                yield Problem(what="wrong shape", key=key, expected=expected, got=str(list(tree[key].shape)))
            ranks.setdefault((factor.scope, factor.row), {}).setdefault(rank, key)
    for keys in ranks.values():
        if len(keys) > 1:
            got = ", ".join(f"{rank} ({key})" for rank, key in keys.items())
            yield Problem(what="factors of one tensor differ in rank", key=next(iter(keys.values())), got=got)


def fits(found: Found, tree: Mapping[str, Any], form: Form) -> bool:
    """Whether every tensor that was found has a shape of this form, for some rank."""
    return all(
        _fit(found.config, factor, form, tree[key].shape)[1]
        for factor, places in found.factors.items()
        for key in places.values()
    )


def shape(config: MiniMaxConfig, factor: Factor, form: Form, rank: int) -> tuple[int, ...]:
    """The shape of one tensor of a factor."""
    sizes, experts = axis_sizes(config), config.num_local_experts
    rows, cols = (sizes[axis] for axis in _ROWS[factor.row.native].axes)
    wide = factor.parts * rows
    shapes: dict[Form, tuple[tuple[int, ...], tuple[int, ...]]] = {
        "split": ((rank, cols), (rows, rank)),
        "grouped": ((experts, cols, rank), (experts, rank, wide)),
        "wrapped": ((experts * rank, cols), (wide, experts * rank)),
        "legacy": ((experts * rank, wide), (cols, experts * rank)),
    }
    return shapes[form][SIDES.index(factor.side)]


class Adapted(NamedTuple):
    """What a factor adapts: the index of the entry in its `Specs`, and which factor it is."""

    entry: int
    side: Side


@functools.lru_cache(maxsize=8)
def adapted(config: MiniMaxConfig) -> dict[str, Adapted]:
    """By name without any prefix: every factor of grouped experts, and of matrices that are not grouped."""
    entries = specs(config, "").entries
    index = {entry.native: at for at, entry in enumerate(entries)}
    templates = {
        in_layer(row.grouped, layer): index[row.native.removeprefix(PREFIX).replace("{layer}", str(layer))]
        for row in LORA_ROWS
        for layer in range(config.num_hidden_layers)
    }
    for entry in entries:
        if len(entry.part_shape) == 2 and not entry.row.grouped:
            templates |= {lora_of(key): index[entry.native] for key in (entry.native, entry.keys[0][0])}
    return {_filled(name, side, 0): Adapted(at, side) for name, at in templates.items() for side in SIDES}


def _fit(config: MiniMaxConfig, factor: Factor, form: Form, got: tuple[int, ...]) -> tuple[int, bool]:
    rank = math.prod(got) // math.prod(shape(config, factor, form, 1))
    return rank, rank > 0 and shape(config, factor, form, rank) == tuple(got)


class _Slot(NamedTuple):
    form: Form
    row: LoraRow
    side: Side
    templates: tuple[str, ...]
    place: Place


@functools.lru_cache(maxsize=8)
def _slots(config: MiniMaxConfig) -> dict[str, _Slot]:
    """What each name behind `layers.{layer}.` is."""
    slots = {}
    for row in LORA_ROWS:
        forms: list[tuple[Form, tuple[str, ...]]] = [("split", row.hub), ("split", row.nemo)]
        forms += [("grouped", (row.grouped,)), ("wrapped", (row.wrapped,))]
        for form, templates in forms:
            for side in SIDES:
                for expert in range(config.num_local_experts if form == "split" else 1):
                    for part, template in enumerate(templates):
                        slot = _Slot(form, row, side, templates, Place(expert, part))
                        slots[_filled(template, side, expert)] = slot
    return slots


def _missing(found: Found, slots: Mapping[str, _Slot], partial: bool) -> Iterator[Problem]:
    for factor, places in found.factors.items():
        templates = slots[next(iter(places.values())).removeprefix(factor.scope)].templates
        experts = range(found.config.num_local_experts if found.form == "split" else 1)
        wanted = [Place(expert, part) for expert in experts for part in range(len(templates))]
        lacking = [factor.key(templates[place.part], place.expert) for place in wanted if place not in places]
        if lacking:
            got = f"{len(places)} of the {len(wanted)} tensors of this factor"
            yield Problem(what="missing tensor", key=lacking[0], got=got)
        if factor.other not in found.factors and not partial:
            yield Problem(what="missing tensor", key=factor.other.key(templates[0]), got="its other factor alone")


def _filled(template: str, side: Side, expert: int) -> str:
    return template.replace("{side}", side).replace("{expert}", str(expert))
