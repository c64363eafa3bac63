"""What changed between two checkpoints: the section of a report that tells it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
from plotly.graph_objects import Figure

from minimax_jax.jobs.difference import RELATIVE
from minimax_jax.jobs.findings import percent
from minimax_jax.jobs.overview import Figures, Overview, relative_change
from minimax_jax.layout.table import cut_at_layer
from minimax_jax.page import plots
from minimax_jax.page.names import expert_name, matrix_names, weight_name
from minimax_jax.page.parts import Section, Table, per_layer
from minimax_jax.page.plots import Plot

_LISTED = 20


def changes(seen: Overview) -> Section:
    """The section: a map of experts, one of all else, and the ranked lists."""
    first, second = (str(inspection.path) for inspection in seen.checkpoints)
    title = "Quantisation error" if seen.quantised else "What changed"
    note = f"{RELATIVE.capitalize()}, over an expert's matrices."
    maps = [Plot(name="changes", title="By expert", note=note, figure=_expert_map(seen))]
    if any(map(_differs, (each for each in seen.weights if each.layer is not None and each.expert is None))):
        same = "The same, weight by weight."
        maps.append(Plot(name="changes-others", title="Everything else", note=same, figure=_others(seen), tall=True))
    text = f"From {first} to {second}."
    return Section(title=title, text=text, plots=tuple(maps), tables=tuple(_tables(seen)))


def _expert_map(seen: Overview) -> Figure:
    parts = 100 * seen.grid(lambda each: relative_change([each]))
    whole = np.full(parts.shape[:2], np.nan)
    for place, group in _by_expert(seen).items():
        whole[place] = 100 * relative_change(group)
    hover = [f"<b>{expert_name(seen)}</b>", "changed by %{z:.4g} %"]
    hover += [f"{name}: %{{customdata[{n}]:.4g}} %" for n, name in enumerate(matrix_names(seen))]
    return plots.heat_map(whole, hover, told=parts, unit=" %")


def _others(seen: Overview) -> Figure:
    kinds = per_layer(seen, lambda each: 100 * relative_change([each]))
    labels = [cut_at_layer(weight_name(seen, kind, "0"))[2] for kind in kinds]
    prefix = "".join(cut_at_layer(weight_name(seen, next(iter(kinds)), "%{x}"))[:1])
    hover = [f"<b>{prefix}%{{text}}</b>", "changed by %{z:.4g} %"]
    return plots.strips(labels, np.array(list(kinds.values())), hover, unit=" %")


def _tables(seen: Overview) -> Iterator[Table]:
    name = expert_name(seen).replace("%{y}", "{y}").replace("%{x}", "{x}")
    experts = {name.format(y=layer, x=expert): group for (layer, expert), group in _by_expert(seen).items()}
    others = {each.key: [each] for each in seen.weights if each.expert is None}
    yield _ranked("Experts that moved most", seen, experts)
    yield _ranked("Everything else that moved", seen, others)


def _by_expert(seen: Overview) -> dict[tuple[int, int], list[Figures]]:
    """The matrices of every expert, by layer and expert."""
    found: dict[tuple[int, int], list[Figures]] = {}
    for each in seen.weights:
        if each.expert is not None and each.layer is not None:
            found.setdefault((each.layer, each.expert), []).append(each)
    return found


def _ranked(title: str, seen: Overview, groups: dict[str, list[Figures]]) -> Table:
    moved = {name: group for name, group in groups.items() if any(map(_differs, group))}
    shares = {name: relative_change(group) for name, group in moved.items()}
    ranked = sorted(moved, key=lambda name: -shares[name])[:_LISTED]
    rows = tuple((name, percent(shares[name]), *_told(moved[name])) for name in ranked)
    told = f"{title} ({len(ranked)} of {len(moved):,})" if moved else f"{title}: none"
    return Table(title=told, columns=("name", "relative change", "largest", "elements"), rows=rows)


def _differs(each: Figures) -> bool:
    return each.change is not None and each.change.differing > 0


def _told(group: Iterable[Figures]) -> tuple[str, str]:
    """Largest difference, and share of the elements that differ."""
    pairs = [(each, each.change) for each in group if each.change is not None]
    differing = sum(change.differing for _, change in pairs) / sum(each.elements for each, _ in pairs)
    return f"{max(change.max_abs for _, change in pairs):.4g}", percent(differing)
