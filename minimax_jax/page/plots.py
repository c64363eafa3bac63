"""The kinds of plots that a report has, as plotly figures. Colours and sizes that depend on the reader are the page's.

Arrays go into the page as float32 in base64, so that a map of all experts takes 85 kB.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import plotly.graph_objects as go
from plotly.graph_objects import Figure

Array = npt.NDArray[Any]

_CLIPPED = 0.005
"""The share of a map's values at each end beyond which colours do not tell them apart: hovering does."""


@dataclass(frozen=True, kw_only=True)
class Plot:
    """A plot in a page.

    Attributes:
        name: id of its element.
        title: what it shows.
        note: how to read it, in plain text.
        figure: the plotly figure.
        tall: whether it takes more height than most.
    """

    name: str
    title: str
    note: str
    figure: Figure
    tall: bool = False


def heat_map(
    values: Array,
    hover: Sequence[str],
    *,
    told: Array | None = None,
    unit: str = "",
    diverging: bool = False,
) -> Figure:
    """A map of experts: `values [layers, experts]`, layer 0 on top.

    Args:
        values: what the colours show; NaN leaves a hole.
        hover: lines to show for a cell, in plotly's templates: `%{x}`, `%{y}`, `%{z}`, `%{customdata[0]}`.
        told: further numbers for these, `[layers, experts, numbers]`.
        unit: beside the numbers of the colour bar.
        diverging: whether colours are of both sides of zero.
    """
    cells = {"customdata": None if told is None else told.astype(np.float32)}
    figure = _figure(_cells(values, hover, unit=unit, diverging=diverging, **cells))
    figure.update_xaxes(title="expert", showgrid=False, zeroline=False, constrain="domain")
    figure.update_yaxes(title="layer", autorange="reversed", showgrid=False, zeroline=False, **_whole(len(values)))
    return figure


def strips(names: Sequence[str], values: Array, hover: Sequence[str], *, unit: str = "") -> Figure:
    """A strip over the layers for each of some things, each under its name, as bars are.

    Args:
        names: theirs, the first on top.
        values: what the colours show, `[things, layers]`.
        hover: as in `heat_map`; `%{text}` is the name.
        unit: as in `heat_map`.
    """
    rows = np.full((2 * len(names), values.shape[1]), np.nan)  # every second one is room for a name
    rows[1::2] = values
    text = [[name] * values.shape[1] for name in names for _ in range(2)]
    figure = _figure(_cells(rows, hover, unit=unit, text=text))
    for n, name in enumerate(names):
        _name(figure, name, x=-0.5, y=2 * n + 0.5)
    figure.update_xaxes(title="layer", showgrid=False, zeroline=False, constrain="domain", **_whole(values.shape[1]))
    figure.update_yaxes(autorange="reversed", showticklabels=False, ticks="", showgrid=False, zeroline=False)
    figure.update_layout(margin_l=8)
    return figure


def bars(names: Sequence[str], values: Sequence[float], hover: str, told: Sequence[Any] = ()) -> Figure:
    """Horizontal bars, the first on top, each under its name: a margin for names would take all of a narrow page."""
    cells = {"customdata": list(told), "hovertemplate": hover, "meta": "accent"}
    figure = _figure(go.Bar(y=list(range(len(names))), x=list(values), orientation="h", width=0.36, **cells))
    for n, name in enumerate(names):
        _name(figure, name, x=0, y=n - 0.2)
    figure.update_xaxes(range=[0, 1.04 * max(values)], showgrid=False)
    figure.update_yaxes(range=[len(names) - 0.5, -0.8], showticklabels=False, showgrid=False, zeroline=False)
    figure.update_layout(margin={"l": 8, "b": 28})
    return figure


def histogram(values: Sequence[float], shares: Array, hover: str, told: Array) -> Figure:
    """How often each of some values occurs, in per cent; the bars stand side by side, whatever the values are."""
    figure = _figure(go.Bar(x=np.arange(len(values)), y=shares, customdata=told, hovertemplate=hover, meta="accent"))
    ticks = {f"{value + 0.0:g}": n for n, value in enumerate(values) if abs(value) in (0, 2**-3, 8, 448)}
    figure.update_xaxes(
        tickvals=list(ticks.values()), ticktext=list(ticks), tickangle=0, showgrid=False, ticks="outside"
    )
    figure.update_layout(margin={"r": 24, "b": 34})
    figure.update_yaxes(ticksuffix=" %", rangemode="tozero")
    figure.update_layout(bargap=0)
    return figure


def lines(
    x: Sequence[int],
    series: Mapping[str, Sequence[float]],
    hover: Mapping[str, str],
    *,
    scale: Literal["linear", "log"],
) -> Figure:
    """One line for each series, over the layers."""
    dashes = itertools.cycle(["solid", "dash", "dot", "dashdot"])
    figure = _figure(
        *(
            go.Scatter(
                x=list(x),
                y=list(y),
                name=name,
                mode="lines+markers",
                line={"width": 1.5, "dash": dash},
                marker={"size": 4},
                hovertemplate=hover[name] + "<extra></extra>",
                meta="series",
            )
            for (name, y), dash in zip(series.items(), dashes, strict=False)
        )
    )
    figure.update_xaxes(**_whole(len(x)))
    figure.update_yaxes(type=scale, exponentformat="power", **({"dtick": 1} if scale == "log" else {}))
    figure.update_layout(showlegend=True, legend={"orientation": "h", "yanchor": "top", "y": -0.08, "x": 0})
    return figure


def band(x: Sequence[int], quantiles: Array, hover: str) -> Figure:
    """The spread of something in each layer: `quantiles [5, layers]` are minimum, quartiles, median and maximum."""
    low, lower, middle, upper, high = quantiles
    edge = {"mode": "lines", "line": {"width": 0}, "hoverinfo": "skip"}
    hidden, area = {**edge, "showlegend": False}, {**edge, "fill": "tonexty", "meta": "area"}
    figure = _figure(
        go.Scatter(x=list(x), y=low, **hidden),
        go.Scatter(
            x=list(x), y=high, name="least to largest", fill="tonexty", **{**edge, "showlegend": True}, meta="area"
        ),
        go.Scatter(x=list(x), y=lower, **hidden),
        go.Scatter(x=list(x), y=upper, name="middle half", **area),
        go.Scatter(
            x=list(x),
            y=middle,
            name="median",
            mode="lines+markers",
            line={"width": 2},
            marker={"size": 4},
            customdata=quantiles.T,
            hovertemplate=hover + "<extra></extra>",
            meta="accent",
        ),
    )
    figure.update_xaxes(title="layer", **_whole(len(x)))
    figure.update_layout(showlegend=True, legend={"orientation": "h", "yanchor": "bottom", "y": 1.02, "x": 0})
    return figure


def points(x: Sequence[Any], y: Sequence[float], told: Sequence[Any], hover: str, titles: tuple[str, str]) -> Figure:
    """A dot for each of a few things."""
    figure = _figure(
        go.Scatter(
            x=list(x),
            y=list(y),
            mode="markers",
            marker={"size": 7, "opacity": 0.75},
            customdata=list(told),
            hovertemplate=hover + "<extra></extra>",
            meta="accent",
        )
    )
    figure.update_xaxes(title=titles[0])
    figure.update_yaxes(title=titles[1], rangemode="tozero")
    return figure


def _cells(values: Array, hover: Sequence[str], *, unit: str, diverging: bool = False, **more: Any) -> go.Heatmap:
    low, high = _color_range(values, diverging=diverging)
    return go.Heatmap(
        z=values.astype(np.float32),
        hovertemplate="<br>".join(hover) + "<extra></extra>",
        hoverongaps=False,
        zmin=low,
        zmax=high,
        coloraxis=None,
        colorbar={"thickness": 10, "len": 1.0, "outlinewidth": 0, "ticksuffix": unit, "xpad": 6},
        meta="diverging" if diverging else "sequential",
        **more,
    )


def _name(figure: Figure, name: str, *, x: float, y: float) -> None:
    """Write a name above a place, from its left on."""
    figure.add_annotation(x=x, y=y, text=name, showarrow=False, xanchor="left", yanchor="bottom", borderpad=0)


def _figure(*traces: Any) -> Figure:
    layout = {
        "template": "none",
        "margin": {"l": 56, "r": 12, "t": 12, "b": 44},
        "hoverlabel": {"align": "left", "namelength": -1},
        "showlegend": False,
        "dragmode": False,
    }
    return Figure(data=list(traces), layout=layout)


def _whole(count: int) -> dict[str, Any]:
    """Ticks at whole numbers, also where there are few."""
    return {"dtick": 1} if count <= 8 else {"tick0": 0}


def _color_range(values: Array, *, diverging: bool) -> tuple[float, float]:
    """Where colours begin and end; never the same number twice, which plotly takes for no range."""
    finite = values[np.isfinite(values)]
    if not finite.size:
        return 0.0, 1.0
    if diverging:
        reach = float(np.quantile(np.abs(finite), 1 - _CLIPPED)) or 1.0
        return -reach, reach
    low, high = (float(end) for end in np.quantile(finite, (_CLIPPED, 1 - _CLIPPED)))
    return (low, high) if high > low else (low, low + (abs(low) or 1.0))
