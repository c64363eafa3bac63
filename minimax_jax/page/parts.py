"""What sections are made of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from minimax_jax.jobs.overview import Figures, Overview
from minimax_jax.layout.table import dissect
from minimax_jax.page.plots import Plot


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table in a page.

    Attributes:
        title: above it.
        columns: their heads.
        rows: their cells, as text.
        folded: whether it is shown on demand.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    folded: bool = False


@dataclass(frozen=True, kw_only=True)
class Section:
    """A section of a page: text, then plots, then tables."""

    title: str
    text: str = ""
    plots: tuple[Plot, ...] = ()
    tables: tuple[Table, ...] = ()


def per_layer(seen: Overview, figure: Callable[[Figures], float]) -> dict[str, list[float]]:
    """A figure of each kind of weight that a layer has one of, for every layer: by kind."""
    found: dict[str, list[float]] = {}
    for each in seen.weights:
        if each.layer is not None and each.expert is None:
            found.setdefault(dissect(each.key).kind, []).append(figure(each))
    return found
