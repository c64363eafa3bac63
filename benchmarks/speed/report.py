"""A run as a table, as JSON, as a picture, and as a part of docs/performance.md."""

from __future__ import annotations

import json
import os
import platform
import statistics
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from itertools import groupby
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks import pages
from benchmarks.speed import files, memory
from benchmarks.speed.rounds import Figures
from benchmarks.speed.targets import Target, ratio

VERSIONED = ("minimax_jax", "jax", "numba", "numpy", "torch", "transformers", "nemo-automodel")
COLUMNS = ("", "experts", "GB/s", "at best", "of the bound", "at best", "x NeMo", "core-s/GB", "peak MB")
BOUNDS = {
    memory.DEQUANTISE: {None: memory.STREAM},
    memory.QUANTISE: {None: memory.STREAM_BACK},
    **{
        where: {
            files.TO_BF16: files.COPY_TWICE,
            files.NEMO: files.COPY_TWICE,
            files.COPY_TWICE: files.COPY_TWICE,
            None: files.COPY,
        }
        for where in (files.WARM, files.COLD)
    },
}
"""What bounds each contestant, by section and name; None for the rest of a section."""

NEMO = {memory.DEQUANTISE: memory.NEMO, files.WARM: files.NEMO}


@dataclass(frozen=True, kw_only=True)
class Run:
    """All that one run measured; see `targets.targets`."""

    found: Mapping[tuple[str, str], Figures]
    alone: Mapping[str, Mapping[str, Any]]
    targets: tuple[Target, ...]
    rounds: int


def show(run: Run) -> None:
    """Print the tables."""
    console = Console(width=140)
    for section, rows in _sections(run):
        console.print(_table(section, COLUMNS, (list(map(str, row)) for row in rows)))
    console.print(_table("in processes of their own", ("", ""), _alone(run)))
    console.print(_table("targets", ("", "target", "measured", ""), _targets(run)))


def write(run: Run, output: Path) -> None:
    """Write `output` with the suffixes .json and .png."""
    output.with_suffix(".json").write_text(json.dumps(_document(run), indent=1) + "\n")
    _plot(run, output.with_suffix(".png"))


def write_page(run: Run) -> None:
    """Put the tables into docs/performance.md."""
    parts = [f"{_machine()}; {run.rounds} rounds, medians; {_versions()}.\n"]
    parts += [pages.table((section, *COLUMNS[1:]), rows) for section, rows in _sections(run)]
    parts.append(pages.table(("in processes of their own", ""), _alone(run)))
    parts.append(pages.table(("target", "wanted", "measured", ""), _targets(run)))
    parts.append("![GB/s of every contestant](speed.png)\n")
    pages.put(pages.DOCS / "performance.md", "make bench BENCH_FLAGS=--write-docs", parts)


def _sections(run: Run) -> Iterator[tuple[str, list[tuple[str, ...]]]]:
    for section, group in groupby(run.found.values(), key=lambda one: one.contestant.section):
        yield section, [_row(run, figures) for figures in group]


def _row(run: Run, figures: Figures) -> tuple[str, ...]:
    one = figures.contestant
    bound = bound_of(run, figures)
    nemo = run.found.get((one.section, NEMO.get(one.section, "")))
    return (
        one.name,
        str(one.experts),
        f"{speed(figures):.2f}",
        f"{best(figures):.2f}",
        f"{ratio(figures, bound):.2f}",
        f"{best(figures) / best(bound):.2f}",
        f"{ratio(figures, nemo):.1f}" if nemo else "",
        f"{statistics.median(figures.core_seconds) / one.nbytes * 1e9:.2f}",
        f"{figures.peak_bytes / 1e6:.0f}",
    )


def bound_of(run: Run, figures: Figures) -> Figures:
    """The contestant that does the least work of the same kind."""
    section = figures.contestant.section
    bounds = BOUNDS[section]
    return run.found[section, bounds.get(figures.contestant.name, bounds[None])]


def speed(figures: Figures) -> float:
    """GB/s."""
    return figures.contestant.nbytes / statistics.median(figures.seconds) / 1e9


def best(figures: Figures) -> float:
    """GB/s of the fastest round: what others do to this machine makes it slower, never faster."""
    return figures.contestant.nbytes / min(figures.seconds) / 1e9


def _alone(run: Run) -> Iterator[tuple[str, str]]:
    for task, found in run.alone.items():
        if task.startswith("load"):
            gbps = found["fp8_bytes"] / statistics.median(found["seconds"]) / 1e9
            text = f"{gbps:.2f} GB/s of FP8, {found['peak_bytes'] / 1e6:.0f} MB beside its arrays"
            yield f"{task}, sharded over 8 fake devices", text
        elif task.startswith("convert"):
            text = (
                f"{found['seconds']:.2f} s with the first call of all, {found['peak_bytes'] / 1e6:.0f} MB at its peak"
            )
            yield task, text
        elif task == "pieces":
            for name, value in found.items():
                yield f"{name}, in the cache of one core", f"{value:.1f} G elements/s"
        else:
            for name, value in found.items():
                yield name, f"{value:.2f} s" if isinstance(value, float) else f"{value:,}"


def _targets(run: Run) -> Iterator[tuple[str, ...]]:
    for one in run.targets:
        yield one.name, one.wanted, f"{one.measured:.3g}{one.unit}", "met" if one.met else "NOT MET"


def _table(title: str, columns: tuple[str, ...], rows: Any) -> Table:
    table = Table(title=title, title_justify="left", box=None)
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number == 0 else "right")
    for row in rows:
        table.add_row(*row)
    return table


def _document(run: Run) -> dict[str, Any]:
    return {
        "machine": _machine(),
        "versions": _versions(),
        "rounds": run.rounds,
        "contestants": [
            {
                "section": one.contestant.section,
                "name": one.contestant.name,
                "role": one.contestant.role,
                "experts": one.contestant.experts,
                "fp8_bytes": one.contestant.nbytes,
                "seconds": one.seconds,
                "core_seconds": one.core_seconds,
                "peak_bytes": one.peak_bytes,
                "gb_per_s": speed(one),
                "ratio_to_bound": ratio(one, bound_of(run, one)),
                "best_gb_per_s": best(one),
            }
            for one in run.found.values()
        ],
        "alone": dict(run.alone),
        "targets": [
            {"name": one.name, "wanted": one.wanted, "measured": one.measured, "unit": one.unit, "met": one.met}
            for one in run.targets
        ],
    }


def _machine() -> str:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{cores} cores, {platform.machine()}, {platform.system()}, Python {platform.python_version()}"


def _versions() -> str:
    return ", ".join(f"{name} {_version(name)}" for name in VERSIONED)


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "missing"


def _plot(run: Run, file: Path) -> None:
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    colours = {"ours": "tab:green", "peer": "tab:orange", "bound": "tab:grey"}
    sections = list(_sections(run))
    figure, axes = pyplot.subplots(len(sections), 1, figsize=(9, 1.2 + 2 * len(sections)), layout="constrained")
    for axis, (section, _) in zip(axes, sections, strict=True):
        figures = [one for one in run.found.values() if one.contestant.section == section][::-1]
        names, roles = ([getattr(one.contestant, what) for one in figures] for what in ("name", "role"))
        bars = axis.barh(names, list(map(speed, figures)), color=[colours[role] for role in roles])
        axis.bar_label(bars, fmt="%.2f", padding=3, fontsize=8)
        axis.set_title(f"{section} (GB/s of FP8)", loc="left", fontsize=9)
        axis.tick_params(labelsize=8)
        axis.margins(x=0.12)
    figure.savefig(file, dpi=80)
    pyplot.close(figure)
