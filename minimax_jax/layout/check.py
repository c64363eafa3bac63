"""Checks the tensors of a checkpoint, on disk or in memory, against the specs before any long work."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass

from minimax_jax.bulk import without_collector
from minimax_jax.dtypes import FLOATS
from minimax_jax.errors import LayoutError, Problem
from minimax_jax.layout.arrangement import arrange, stored_names
from minimax_jax.layout.config import MiniMaxConfig
from minimax_jax.layout.diagnosis import Stored, explain, problem_of
from minimax_jax.layout.forms import FURTHER, HOLDING_FP8
from minimax_jax.layout.forms import Layout as Layout
from minimax_jax.layout.specs import Entry, Specs, specs
from minimax_jax.layout.table import PREFIX, SCALE_SUFFIX


@dataclass(frozen=True, kw_only=True)
class Survey:
    """A checkpoint that passed its check.

    Attributes:
        layout: whose names the tensors have.
        specs: what was checked against.
        dtypes: stored dtype of the weights, by native name; entries that a partial checkpoint lacks are absent.
    """

    layout: Layout
    specs: Specs
    dtypes: dict[str, str]

    @property
    def entries(self) -> Iterator[Entry]:
        """The entries that are there."""
        return (entry for entry in self.specs.entries if entry.native in self.dtypes)


@without_collector
def survey(
    tensors: Mapping[str, Stored], config: MiniMaxConfig, *, layout: Layout | None = None, partial: bool = False
) -> Survey:
    """Check every tensor against the specs.

    Args:
        tensors: stored tensors by name.
        config: the checkpoint's config.
        layout: whose names they should have; None finds out from the names.
        partial: allow whole native tensors to be absent; those that are there must be complete all the same.

    Raises:
        LayoutError: everything that is missing, unexpected, incomplete, of a wrong shape or dtype, FP8 without scales
            or scales without FP8. Many problems of one kind are told as one, with their number.
    """
    table = table_of(tensors, config)
    layout = _settle(tensors, table, layout)
    each = [EntryCheck(entry, layout, tensors) for entry in table.entries]
    checks = list({check.weights[0]: check for check in reversed(each)}.values())[::-1]  # one for each stack of layers
    known = {name for check in checks for name in check.names}
    unexpected = [key for key in tensors if key not in known]
    wanted = [check for check in checks if check.present or not partial]
    problems = [problem for check in wanted for problem in check.problems()]
    if problems or unexpected:
        raise LayoutError(
            explain(tensors, table, layout=layout, problems=problems, unexpected=unexpected, partial=partial)
        )
    dtypes = {check.entry.native: check.dtype for check in each if check.present or not partial}
    return Survey(layout=layout, specs=table, dtypes=dtypes)


def table_of(keys: Collection[str], config: MiniMaxConfig) -> Specs:
    """The specs of a checkpoint with these names: some exports leave out the prefix of the published ones.

    MaxText's names never have it.
    """
    whole = specs(config)
    bare = bool(keys) and not any(key.startswith(PREFIX) for key in keys) and detect(keys, whole) is None
    return specs(config, "") if bare else whole


def detect(keys: Collection[str], table: Specs) -> Layout | None:
    """Whose names these are; None when all of them are names that several layouts share."""
    return next((layout for layout, names in _own_names(table) if _first(names, keys) is not None), None)


def _settle(tensors: Mapping[str, Stored], table: Specs, layout: Layout | None) -> Layout:
    found = detect(tensors, table)
    if layout is None or found is None or found == layout:
        return layout or found or "hf"
    key = _first(dict(_own_names(table))[found], tensors)
    what = "the tensors have the names of the other layout"
    raise LayoutError(Problem(what=what, key=key, expected=layout, got=found))


def _own_names(table: Specs) -> Iterator[tuple[Layout, Iterable[str]]]:
    """Names of weights that one layout alone has."""
    further = {layout: {n for entry in table.entries for n in stored_names(entry, layout)} for layout in FURTHER}
    shared = set().union(*further.values())
    yield "native", (name for name in table.by_native if name not in table.places and name not in shared)
    yield "hf", (key for entry in table.entries for keys in entry.keys for key in keys if key != entry.native)
    for layout, names in further.items():
        others = set().union(*(further[other] for other in FURTHER if other != layout))
        yield layout, sorted(names - others - table.by_native.keys())


def _first(names: Iterable[str], keys: Collection[str]) -> str | None:
    return next((name for name in names if name in keys), None)


class EntryCheck:
    """Compares the stored tensors of one entry with what it should have.

    Attributes:
        names: of all tensors that the entry may have: weights, and scales where it is block-scaled.
        present: whether any of them is there.
        dtype: stored dtype of the weights.
    """

    def __init__(self, entry: Entry, layout: Layout, tensors: Mapping[str, Stored]):
        self.entry = entry
        self.tensors = tensors
        self.layout = layout
        self.weights = _weights(entry, layout)
        self.names = [*self.weights, *(key + SCALE_SUFFIX for key in self.weights if entry.row.scaled)]
        self.present = any(key in tensors for key in self.names)
        self.dtype = next((tensors[key].dtype for key in self.weights if key in tensors), "")

    def problems(self) -> Iterator[Problem]:
        """Everything that is wrong with the entry."""
        yield from self._missing()
        yield from self._mixed()
        sound = set()  # what is right of one weight and its scales is right of all that are stored alike
        for key in self.weights:
            weight = self.tensors.get(key)
            scale = self.tensors.get(key + SCALE_SUFFIX) if self.entry.row.scaled else None
            form = _form(weight), _form(scale)
            if form not in sound:
                found = [*self._weight(key, weight), *self._scale(key, weight, scale)]
                yield from found
                if not found:
                    sound.add(form)

    def _missing(self) -> Iterator[Problem]:
        missing = [key for key in self.weights if key not in self.tensors]
        if missing:
            expected = f"{len(self.weights)} for {self.entry.row.native}"
            got = str(len(self.weights) - len(missing))
            remedy = "fetch an incomplete download again"
            yield Problem(what="missing tensor", key=missing[0], expected=expected, got=got, remedy=remedy)

    def _mixed(self) -> Iterator[Problem]:
        first_keys = {self.tensors[key].dtype: key for key in reversed(self.weights) if key in self.tensors}
        if len(first_keys) > 1:
            key = next(key for dtype, key in first_keys.items() if dtype != self.dtype)
            what, got = "weights of one tensor differ in dtype", " and ".join(sorted(first_keys))
            yield problem_of(what, key, self.tensors[key], expected=f"{self.dtype} throughout", got=got)

    def _weight(self, key: str, stored: Stored | None) -> Iterator[Problem]:
        if stored is None:
            return
        allowed = ("F8_E4M3", *FLOATS) if self.entry.row.scaled and self.layout in HOLDING_FP8 else FLOATS
        shape = _shape(self.entry, self.layout)
        if stored.dtype not in allowed:
            yield problem_of("wrong dtype", key, stored, expected=" or ".join(allowed), got=stored.dtype)
        if stored.shape != shape:
            remedy = "it looks transposed" if sorted(stored.shape) == sorted(shape) else None
            got = str(list(stored.shape))
            yield problem_of("wrong shape", key, stored, expected=str(list(shape)), got=got, remedy=remedy)

    def _scale(self, weight_key: str, weight: Stored | None, scale: Stored | None) -> Iterator[Problem]:
        key = weight_key + SCALE_SUFFIX
        quantized = weight is not None and weight.dtype == "F8_E4M3"
        if weight is not None and quantized and scale is None and self.entry.row.scaled:
            expected = f"a tensor of that name with {SCALE_SUFFIX} behind it"
            yield problem_of("FP8 weight without its scales", weight_key, weight, expected=expected, got="none")
        if scale is None:
            return
        if not quantized:
            got = "no weight" if weight is None else weight.dtype
            yield problem_of("scales without their FP8 weight", key, scale, expected="a weight in F8_E4M3", got=got)
        if scale.dtype != "F32":
            yield problem_of("wrong dtype", key, scale, expected="F32", got=scale.dtype)
        grid = _shape(self.entry, self.layout, scales=True)
        if scale.shape != grid:
            got = str(list(scale.shape))
            yield problem_of("wrong grid of scales", key, scale, expected=str(list(grid)), got=got)


def _weights(entry: Entry, layout: Layout) -> list[str]:
    """Names of the tensors that hold the weights of an entry."""
    if layout == "hf":
        return [key for keys in entry.keys for key in keys]
    return [entry.native] if layout == "native" else list(stored_names(entry, layout))


def _form(stored: Stored | None) -> tuple[str, tuple[int, ...]] | None:
    return None if stored is None else (stored.dtype, stored.shape)


def _shape(entry: Entry, layout: Layout, *, scales: bool = False) -> tuple[int, ...]:
    """Shape of each of these tensors, or of its block scales."""
    if layout == "hf":
        return entry.part_grid if scales else entry.part_shape
    if layout == "native":
        return entry.grid if scales else entry.shape
    return arrange(entry, layout, scales=scales).whole_shape
