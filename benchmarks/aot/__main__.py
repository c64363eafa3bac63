"""Compile the project for TPU slices and H100 nodes on a machine that has neither, and write what it costs there."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path

from benchmarks.aot import targets

targets.prepare()

from benchmarks.aot import model, report  # noqa: E402
from benchmarks.aot.measure import Row, measure  # noqa: E402
from benchmarks.aot.programs import Program, load_step, operations  # noqa: E402
from benchmarks.aot.targets import Target  # noqa: E402

SHAPES = "62 layers, 256 experts of 3072 x 1536, hidden size 3072"

ONE_CHIP = (
    Target(kind="v5e", topology="2x4", chips=1),
    Target(kind="v5p", topology="2x2x2", chips=1),
    Target(kind="v6e", topology="2x4", chips=1),
    Target(kind="h100", topology="1x1x1", chips=1),
)
HOSTS = (
    Target(kind="h100", topology="1x1x1", chips=1),
    Target(kind="v5e", topology="2x4", chips=8),
    Target(kind="v6e", topology="2x4", chips=8),
    Target(kind="h100", topology="1x8x1", chips=8),
    Target(kind="v5e", topology="8x8", chips=64),
)
SERVED = (
    model.Setting(target=Target(kind="h100", topology="1x8x1", chips=8)),
    model.Setting(target=Target(kind="h100", topology="1x8x1", chips=8), batch=1, prompts=1, time=2048),
    model.Setting(target=Target(kind="h100", topology="2x8x1", chips=16), scaled="BF16"),
    model.Setting(target=Target(kind="v5e", topology="4x8", chips=32)),
    model.Setting(target=Target(kind="v5e", topology="8x8", chips=64), scaled="BF16"),
    model.Setting(target=Target(kind="v5p", topology="2x2x2", chips=8)),
    model.Setting(target=Target(kind="v6e", topology="4x4", chips=16)),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="the codec alone, on one chip: a check that it runs")
    parser.add_argument("--output", type=Path, default=Path("docs/aot.md"), help="the table; a JSON goes next to it")
    options = parser.parse_args()
    here = [kind for kind in targets.KINDS if not _missing(kind)]
    if len(here) < len(targets.KINDS) and not options.quick:
        sys.exit("nothing is written: the whole table needs all compilers")
    sections = {
        heading: [_shown(measure(program)) for program in programs] for heading, programs in _plan(here, options.quick)
    }
    if options.quick:
        return
    versions = targets.versions()
    options.output.write_text(report.markdown(sections, versions, SHAPES))
    options.output.with_suffix(".json").write_text(report.document(sections, versions))


def _plan(here: Collection[str], quick: bool) -> Iterator[tuple[str, Iterable[Program]]]:
    """What is compiled for the kinds of chips that can be, by the heading of its section."""
    chips = (target for target in ONE_CHIP if target.kind in here)
    if quick:
        yield "One chip", (program for target in chips for program in operations(target, experts=4))
        return
    yield "A chip's share of one layer", (program for target in chips for program in operations(target, experts=32))
    shares = (target for target in ONE_CHIP if target.kind in here)
    yield "One step of a sharded load", (program for target in shares for program in load_step(target))
    hosts = (target for target in HOSTS if target.kind in here)
    yield "A whole layer: on one chip, a host or more", (program for target in hosts for program in operations(target))
    served = (setting for setting in SERVED if setting.target.kind in here)
    yield "The model", (program for setting in served for program in model.programs(setting))


def _missing(kind: str) -> bool:
    if needed := targets.missing(kind):
        print(f"left out: {kind}, whose compiler {needed} is not installed: {targets.INSTALL}", file=sys.stderr)
    return bool(needed)


def _shown(row: Row) -> Row:
    print(report.line(row), flush=True)
    return row


if __name__ == "__main__":
    main()
