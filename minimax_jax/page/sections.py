"""What stands in a report: sections of plots and tables, made of the figures of a checkpoint."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from minimax_jax.display import size
from minimax_jax.jobs.figures import CODE_VALUES, OUTLIER_RATIO
from minimax_jax.jobs.findings import expert_norms, robust_sigmas
from minimax_jax.jobs.overview import Figures, Overview, ratios
from minimax_jax.layout.table import cut_at_layer
from minimax_jax.page import plots
from minimax_jax.page.changes import changes
from minimax_jax.page.names import expert_name, matrix_names, weight_name
from minimax_jax.page.parts import Section, Table, per_layer
from minimax_jax.page.plots import Plot

_OUTLIERS_PLOTTED, _OUTLIERS_LISTED = 500, 15


def sections(seen: Overview) -> Iterator[Section]:
    """The sections of a report, in order; without those that have nothing to show."""
    if len(seen.checkpoints) == 2:
        yield changes(seen)
    yield _sizes(seen)
    yield _norms(seen)
    yield _scales(seen)
    yield _errors(seen)
    if seen.codes.any():
        yield _codes(seen)
    yield _outliers(seen)
    if np.isfinite(seen.router_bias).any():
        yield _router_bias(seen)
    yield _others(seen)


def _sizes(seen: Overview) -> Section:
    kinds = seen.checkpoints[0].by_kind
    total = seen.checkpoints[0].total.nbytes
    ranked = sorted(kinds, key=lambda kind: -kinds[kind].nbytes)
    names = [cut_at_layer(kind)[2] for kind in ranked]
    told = [[kind, size(kinds[kind].nbytes), f"{kinds[kind].tensors:,}"] for kind in ranked]
    hover = "<b>%{customdata[0]}</b><br>%{customdata[1]}, %{x:.3g} %<br>%{customdata[2]} tensors<extra></extra>"
    figure = plots.bars(names, [100 * kinds[kind].nbytes / total for kind in ranked], hover, told)
    figure.update_xaxes(ticksuffix=" %")
    plot = Plot(
        name="sizes",
        title="Size by kind",
        note="Share of all bytes; scales count with their weights.",
        figure=figure,
        tall=True,
    )
    rows = [(name, each[1], each[2]) for name, each in zip(names, told, strict=True)]
    table = Table(title="Every kind", columns=("kind", "size", "tensors"), rows=tuple(rows), folded=True)
    return Section(title="What it weighs", text="", plots=(plot,), tables=(table,))


def _norms(seen: Overview) -> Section:
    norms = expert_norms(seen)
    parts = np.sqrt(seen.grid(lambda each: each.squares))
    told = np.concatenate([robust_sigmas(norms)[..., None], parts], axis=-1)
    hover = [f"<b>{expert_name(seen)}</b>", "norm %{z:.5g}", "%{customdata[0]:+.2f} robust sigmas from the layer"]
    hover += [f"{name}: %{{customdata[{n}]:.5g}}" for n, name in enumerate(matrix_names(seen), 1)]
    figure = plots.heat_map(norms, hover, told=told)
    note = "Root of the sum of squares over an expert's matrices; FP8 counts as code x scale. Hover for each matrix."
    return Section(title="Norms of experts", text="", plots=(Plot(name="norms", title="", note=note, figure=figure),))


def _scales(seen: Overview) -> Section:
    spreads = seen.grid(_spread)
    widest = _widest(spreads)
    hover = [f"<b>{expert_name(seen)}</b>", "largest of its matrices: 2^%{z:.3f}"]
    hover += [f"{name}: 2^%{{customdata[{n}]:.3f}}" for n, name in enumerate(matrix_names(seen))]
    figure = plots.heat_map(widest, hover, told=spreads)
    whose = "stored block scales" if seen.codes.any() else "block scales that amax / 448 would give; none are stored"
    note = f"Binary logarithm of the largest over the smallest of the {whose}. Blocks of zeros are left out."
    plot = Plot(name="scales", title="", note=note, figure=figure)
    return Section(title="Spread of block scales", text="", plots=(plot,))


def _errors(seen: Overview) -> Section:
    errors, squares = seen.grid(_error), seen.grid(lambda each: each.squares)
    whole, parts = 100 * ratios(errors.sum(-1), squares.sum(-1)), 100 * ratios(errors, squares)
    hover = [f"<b>{expert_name(seen)}</b>", "%{z:.4g} %"]
    hover += [f"{name}: %{{customdata[{n}]:.4g}} %" for n, name in enumerate(matrix_names(seen))]
    figure = plots.heat_map(whole, hover, told=parts, unit=" %")
    title = "What new scales would change" if seen.codes.any() else "What quantising to FP8 would change"
    note = (
        "Each block quantised anew by amax / 448, in float32: root of the squared change over that of the weights. "
        + ("Zero where the stored scale is the one by amax." if seen.codes.any() else "")
    )
    return Section(title=title, text="", plots=(Plot(name="errors", title="", note=note.strip(), figure=figure),))


def _codes(seen: Overview) -> Section:
    order = np.argsort(np.where(np.isnan(CODE_VALUES), np.inf, CODE_VALUES), kind="stable")
    order = order[np.isfinite(CODE_VALUES[order])]
    counts, total = seen.codes[order], seen.codes.sum()
    told = np.array([[f"0x{code:02X}", f"{CODE_VALUES[code]:g}", f"{seen.codes[code]:,}"] for code in order])
    hover = "<b>code %{customdata[0]}</b> = %{customdata[1]}<br>%{customdata[2]} times, %{y:.3g} %<extra></extra>"
    figure = plots.histogram([float(CODE_VALUES[code]) for code in order], 100 * counts / total, hover, told)
    used, nans = int(np.count_nonzero(counts)), int(total - counts.sum())
    note = (
        "Share of each code, in the order of what it stands for. "
        f"{used} of the 254 codes that are numbers occur, over {total:,} weights; {nans:,} are NaN."
    )
    return Section(title="FP8 codes in use", text="", plots=(Plot(name="codes", title="", note=note, figure=figure),))


def _outliers(seen: Overview) -> Section:
    held = [(each, block) for each in seen.weights if each.scaled for block in each.scaled.outliers]
    held.sort(key=lambda pair: -pair[1].ratio)
    text = f"Blocks with a magnitude of more than {OUTLIER_RATIO:g} times that of the median block of their matrix."
    if not held:
        return Section(title="Outlier blocks", text=f"{text} There are none.")
    shown = held[:_OUTLIERS_PLOTTED]
    told = [[each.key, list(block.block), block.amax] for each, block in shown]
    hover = "<b>%{customdata[0]}</b><br>block %{customdata[1]}<br>largest magnitude %{customdata[2]:.4g}<br>"
    figure = plots.points(
        [each.layer for each, _ in shown],
        [block.ratio for _, block in shown],
        told,
        hover + "%{y:.4g} times the median block",
        ("layer", "times the median"),
    )
    rows = tuple(
        (each.key, str(list(block.block)), f"{block.amax:.4g}", f"{block.ratio:.3g}")
        for each, block in held[:_OUTLIERS_LISTED]
    )
    table = Table(title="The largest", columns=("weight", "block", "magnitude", "times the median"), rows=rows)
    note = f"{len(held):,} of them" + (f"; the {len(shown)} largest are shown." if len(shown) < len(held) else ".")
    plot = Plot(name="outliers", title="", note=note, figure=figure)
    return Section(title="Outlier blocks", text=text, plots=(plot,), tables=(table,))


def _router_bias(seen: Overview) -> Section:
    bias = seen.router_bias.astype(np.float64)
    quantiles = np.quantile(bias, (0, 0.25, 0.5, 0.75, 1), axis=1)
    at_layer, at_row = (weight_name(seen, seen.router_bias_kind, axis) for axis in ("%{x}", "%{y}"))
    numbers = (f"{what} %{{customdata[{n}]:.5g}}" for what, n in (("largest", 4), ("median", 2), ("least", 0)))
    hover = "<br>".join([f"<b>{at_layer}</b>", *numbers])
    layers = range(len(bias))
    spread = plots.band(layers, quantiles, hover)
    centred = bias - quantiles[2][:, None]
    lines = [
        f"<b>{at_row}[%{{x}}]</b>",
        "bias %{customdata[0]:.6g}",
        "%{z:+.4g} from the median",
    ]
    cells = plots.heat_map(centred, lines, told=bias[..., None], diverging=True)
    return Section(
        title="Router bias",
        text="What is added to the scores of experts when they are chosen, and not when they are weighted.",
        plots=(
            Plot(name="bias", title="By layer", note="", figure=spread),
            Plot(name="bias-map", title="By expert", note="Difference from the median of the layer.", figure=cells),
        ),
    )


def _others(seen: Overview) -> Section:
    rms = per_layer(seen, lambda each: float(np.sqrt(each.squares / each.elements)))
    hover = {kind: f"<b>{weight_name(seen, kind, '%{x}')}</b><br>root mean square %{{y:.5g}}" for kind in rms}
    labelled = {cut_at_layer(weight_name(seen, kind, "0"))[2]: kind for kind in rms}
    figure = plots.lines(
        range(seen.config.num_hidden_layers),
        {label: rms[kind] for label, kind in labelled.items()},
        {label: hover[kind] for label, kind in labelled.items()},
        scale="log",
    )
    note = "Root mean square; a logarithmic scale."
    plot = Plot(name="others", title="In each layer", note=note, figure=figure, tall=True)
    outside = [each for each in seen.weights if each.layer is None]
    rows = tuple((each.key, f"{np.sqrt(each.squares / each.elements):.5g}", f"{each.amax:.4g}") for each in outside)
    table = Table(title="Outside of the layers", columns=("weight", "root mean square", "largest magnitude"), rows=rows)
    return Section(title="Attention, norms and routers", text="", plots=(plot,), tables=(table,))


def _widest(spreads: Any) -> Any:
    """The largest along the last axis; NaN where all are NaN."""
    widest = np.where(np.isnan(spreads), -np.inf, spreads).max(-1)
    return np.where(np.isinf(widest), np.nan, widest)


def _spread(each: Figures) -> float:
    return each.scaled.spread if each.scaled else np.nan


def _error(each: Figures) -> float:
    return each.scaled.errors if each.scaled else np.nan
