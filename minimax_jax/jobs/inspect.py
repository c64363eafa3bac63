"""What a checkpoint is, from its headers alone."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from minimax_jax.display import Displayed
from minimax_jax.io.beside import LeftBehind
from minimax_jax.io.header import TensorInfo
from minimax_jax.io.location import Location
from minimax_jax.jobs.left_out import LeftOut
from minimax_jax.jobs.source import Source
from minimax_jax.layout.arrangement import arrange
from minimax_jax.layout.check import Layout
from minimax_jax.layout.config import MiniMaxConfig
from minimax_jax.layout.forms import FORMS
from minimax_jax.layout.specs import Entry
from minimax_jax.layout.table import SCALE_SUFFIX


@dataclass(frozen=True, kw_only=True, slots=True)
class Tally:
    """How many tensors of a sort there are, and their bytes."""

    tensors: int
    nbytes: int


@dataclass(frozen=True, kw_only=True, repr=False)
class Inspection(Displayed):
    """What a checkpoint is.

    Attributes:
        path: what was opened.
        layout: whose names its tensors have.
        config: its config; without blocks where no weight is FP8, whatever the scales beside it say.
        files: how many safetensors files it has.
        total: all tensors of the model.
        by_dtype: its tensors by stored dtype, in safetensors' spelling.
        by_kind: its tensors by kind, named as its layout names it.
        sidecar: source scales beside it, if there are any.
        left_out: tensors in its files that are not the model's, and that nothing reads.
        left_behind: what lies beside them, and no conversion takes along.
    """

    path: Location
    layout: Layout
    config: MiniMaxConfig
    files: int
    total: Tally
    by_dtype: dict[str, Tally]
    by_kind: dict[str, Tally]
    sidecar: Tally
    left_out: tuple[LeftOut, ...]
    left_behind: tuple[LeftBehind, ...] = ()

    def views(self) -> Iterable[Any]:
        """What there is to look at."""
        from minimax_jax.jobs.report import inspection_view

        return inspection_view(self)


def inspect(source: Source) -> Inspection:
    """Sum up an opened checkpoint, which has passed its check."""
    infos = source.checkpoint.tensors
    kinds = {
        spec.key: _kind(source, entry, spec.key) for entry in source.survey.entries for spec in source.specs(entry)
    }
    is_fp8 = "F8_E4M3" in source.survey.dtypes.values()
    return Inspection(
        path=source.path,
        layout=source.survey.layout,
        config=source.config if is_fp8 else source.config.replace(weight_block_size=None),
        files=len(source.checkpoint.files),
        total=_tally(infos.values()),
        by_dtype=_by((info.dtype, info) for info in infos.values()),
        by_kind=_by((kinds[key], info) for key, info in infos.items()),
        sidecar=_tally(source.sidecar.values()),
        left_out=source.left_out,
        left_behind=source.left_behind,
    )


def _kind(source: Source, entry: Entry, key: str) -> str:
    """What the layout calls the kind of a stored tensor; block scales are of the kind of their weights."""
    if source.survey.layout == "native":
        return entry.row.native
    if source.survey.layout in FORMS:
        names = arrange(entry, source.survey.layout).names
        return FORMS[source.survey.layout][entry.row].names[names.index(key.removesuffix(SCALE_SUFFIX))]
    return entry.row.parts[source.survey.specs.places[key].part]


def _by(named: Iterable[tuple[str, TensorInfo]]) -> dict[str, Tally]:
    groups: dict[str, list[TensorInfo]] = {}
    for name, info in named:
        groups.setdefault(name, []).append(info)
    return {name: _tally(infos) for name, infos in groups.items()}


def _tally(infos: Iterable[TensorInfo]) -> Tally:
    sizes = [info.nbytes for info in infos]
    return Tally(tensors=len(sizes), nbytes=sum(sizes))
