"""Time and memory of whole conversions against the number of experts, layers, shards and processes."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.progress import track

from benchmarks import pages
from benchmarks.speed import child
from benchmarks.speed.cases import Case

Point = Mapping[str, Any]


def main(output: Path | None, *, quick: bool, write_docs: bool) -> None:
    """Measure, print, and write `output` with the suffixes .json and .png, and a table into docs/scaling.md."""
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as folder:
        found = {name: list(points) for name, points in _axes(Path(folder), quick)}
    rows = [
        (name, str(point["n"]), f"{point['seconds']:.2f}", f"{point['peak_bytes'] / 1e6:.0f}")
        for name, points in found.items()
        for point in points
    ]
    for name, count, seconds, peak_mb in rows:
        print(f"{name:10}{count:>5}{seconds:>9} s{peak_mb:>8} MB")
    if output:
        output.with_suffix(".json").write_text(json.dumps(found, indent=1) + "\n")
        _plot(found, output.with_suffix(".png"))
    if write_docs:
        parts = [pages.table(("", "", "seconds", "peak MB"), rows), "![Time and peak memory](growth.png)\n"]
        pages.put(pages.DOCS / "scaling.md", "make bench BENCH_FLAGS='--growth --write-docs'", parts)


def _axes(folder: Path, quick: bool) -> Iterator[tuple[str, Iterator[Point]]]:
    counts = (1, 2) if quick else (2, 4, 8, 16, 32)
    yield "experts", (_converted(folder, n, experts=n, layers=1) for n in track(counts, "experts"))
    counts = (1, 2) if quick else (1, 2, 4, 8)
    yield "layers", (_converted(folder, n, experts=2 if quick else 4, layers=n) for n in track(counts, "layers"))
    yield "files", (_in_files(folder, n, 2 if quick else 16) for n in track(counts, "files"))
    counts = (1, 2) if quick else (1, 2, 3, 4)
    yield "processes", (_shared(folder, n, 2 if quick else 32) for n in track(counts, "processes"))


def _converted(folder: Path, n: int, *, experts: int, layers: int) -> Point:
    with tempfile.TemporaryDirectory(dir=folder) as place:
        case = Case.make(Path(place) / "source", experts, layers)
        found = child.call("grow", case.path, Path(place) / "out", 5 * 10**9)
        return {"n": n, "read_bytes": _bytes(case.path), **found}


def _in_files(folder: Path, n: int, experts: int) -> Point:
    with tempfile.TemporaryDirectory(dir=folder) as place:
        case = Case.make(Path(place) / "source", experts)
        # tensors do not span files, so that there may be one file more or less
        found = child.call("grow", case.path, Path(place) / "out", 2 * _bytes(case.path) // n)
        written = len(list((Path(place) / "out").glob("model*.safetensors")))
        return {"n": written, "read_bytes": _bytes(case.path), **found}


def _shared(folder: Path, n: int, experts: int) -> Point:
    """One conversion by `n` processes of one thread each; the seconds of the slowest, and the peak of the largest."""
    with tempfile.TemporaryDirectory(dir=folder) as place:
        case = Case.make(Path(place) / "source", experts)
        with socket.socket() as free:
            free.bind(("localhost", 0))
            address = f"localhost:{free.getsockname()[1]}"
        command = [sys.executable, "-m", "benchmarks.speed.child", "team", str(case.path), str(Path(place) / "out")]
        common = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": str(n), "JAX_PLATFORMS": "cpu"}
        team = [
            subprocess.Popen(command, env=os.environ | common | {"JAX_PROCESS_ID": str(i)}, stdout=subprocess.PIPE)
            for i in range(n)
        ]
        found = [json.loads(one.communicate()[0].splitlines()[-1]) for one in team]  # gloo prints, too
        slowest = {what: max(one[what] for one in found) for what in found[0]}
        return {"n": n, "read_bytes": _bytes(case.path), **slowest}


def _bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def _plot(found: Mapping[str, Sequence[Point]], file: Path) -> None:
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, len(found), figsize=(3 * len(found), 5), layout="constrained", sharex="col")
    for column, (name, points) in enumerate(found.items()):
        counts = [point["n"] for point in points]
        axes[0, column].plot(counts, [point["seconds"] for point in points], "o-")
        axes[1, column].plot(counts, [point["peak_bytes"] / 1e6 for point in points], "o-", color="tab:orange")
        axes[1, column].set_xlabel(name)
        for axis in axes[:, column]:
            axis.set_ylim(bottom=0)
            axis.grid(alpha=0.3)
    axes[0, 0].set_ylabel("seconds")
    axes[1, 0].set_ylabel("peak memory, MB")
    figure.savefig(file, dpi=80)
    pyplot.close(figure)
