"""What conversions cost, beside others' tools and beside what the machine can do.

All contestants run in turn, twice each, several rounds, in one process; the second of two runs counts, and its ratio to
others within one round. Results are compared with an oracle bit for bit before they count. GB/s are gigabytes of FP8 a
second.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.pages import DOCS
from benchmarks.speed import child, files, growth, memory, report, rounds, targets
from benchmarks.speed.cases import Case
from minimax_jax import synthetic


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experts", type=int, default=32, help="of the one layer, a multiple of 8 (default: 32)")
    parser.add_argument("--peer-experts", type=int, default=2, help="for what is slow (default: 2)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="8 experts, run once each: a check that it runs")
    parser.add_argument("--growth", action="store_true", help="time and memory against sizes and processes, instead")
    parser.add_argument("--output", type=Path, help="write NAME.json and NAME.png")
    parser.add_argument("--write-docs", action="store_true", help="docs/performance.md, or docs/scaling.md")
    options = parser.parse_args()
    if options.quick:
        options.experts, options.peer_experts, options.rounds = 8, 1, 1
    output = DOCS / ("growth" if options.growth else "speed") if options.write_docs else options.output
    if options.growth:
        growth.main(output, quick=options.quick, write_docs=options.write_docs)
        return
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as folder:
        run = measure(Path(folder), options.experts, options.peer_experts, options.rounds, twice=not options.quick)
    report.show(run)
    if output:
        report.write(run, output)
    if options.write_docs:
        report.write_page(run)


def measure(folder: Path, experts: int, few_experts: int, count: int, *, twice: bool) -> report.Run:
    """Everything, in files under `folder`."""
    case, few = (Case.make(folder / name, n) for name, n in (("case", experts), ("few", few_experts)))
    alone = _alone(folder, case, count)
    contestants = [*memory.contestants(case, few), *files.contestants(case, few, folder)]
    found = rounds.by_name(rounds.in_turn(contestants, count, twice=twice))
    return report.Run(found=found, alone=alone, targets=tuple(targets.targets(found, alone)), rounds=count)


def _alone(folder: Path, case: Case, count: int) -> dict[str, dict[str, Any]]:
    """What is measured in processes of its own, by task."""
    synthetic.synthesize(folder / "sparse", synthetic.config(real=True), sparse=True)
    child.call("start")  # once in vain: files come into the page cache
    found = {"start": child.call("start"), "plan": child.call("plan", folder / "sparse")}
    found |= {task: child.call(task) for task in ("pages", "pieces")}
    native = folder / "native-alone"
    for dtype in ("bf16", "fp8"):
        found[f"load, {dtype}"] = child.call("load", case.path, dtype, count)
        found[f"load, {dtype}"]["fp8_bytes"] = case.nbytes
        where = native / dtype
        found[f"convert to native {dtype}"] = child.call("convert", case.path, where, "native", dtype)
        found[f"convert {dtype} to FP8"] = child.call("convert", where, native / f"{dtype}-back", "hf-fp8", "fp8")
    return found


if __name__ == "__main__":
    main()
