"""torch_bridge's adapter beside NeMo AutoModel's: speed and peak memory of `from_hf`, from FP8 and from bf16.

Both convert the same layer at the published shapes to bf16, in one process, several times in a row, in turn. Each call
gets tensors of its own, consumes them, and begins with a heap that has been given back to the system. Results are
checked for bit equality before they count. GB/s are gigabytes of source a second, of the calls in a row; a peak is the
most memory in use during a call, its input among it, beyond what was in use before, over the size of the output.
Backends are measured in processes of their own. Linux only.

The call that begins a row is told apart ("turn"): the memory that it takes is what the other adapter has just freed. A
virtual machine with free page reporting is giving that back to its host at that moment, and gets it again a page at a
time, which can take longer than the conversion. So is each adapter's very first call ("first"), which compiles.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from nemo_automodel.components.models.minimax_m2.state_dict_adapter import MiniMaxM2StateDictAdapter as Nemos

from benchmarks import pages
from minimax_jax.ops.host import VARIABLE
from torch_bridge import MiniMaxM2StateDictAdapter as Ours
from torch_bridge import memory

HIDDEN, INTER, BLOCK = 3072, 1536, 128
ADAPTERS = {"nemo": Nemos, "ours": Ours}
BACKENDS = ("numba", "xla")
SOURCES = ("fp8", "bf16")
COLUMNS = {
    "GB/s": "ours_gb_per_s",
    "NeMo": "nemo_gb_per_s",
    "x NeMo": "ratio",
    "turn": "turn_ratio",
    "first": "first_call_ratio",
    "peak": "ours_peak",
    "NeMo's": "nemo_peak",
}
Tensors = dict[str, torch.Tensor]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--experts", type=int, default=32, help="experts of the one layer, at the published shapes")
    parser.add_argument("--rounds", type=int, default=3, help="rows of each adapter")
    parser.add_argument("--calls", type=int, default=4, help="calls in a row")
    parser.add_argument("--backend", choices=BACKENDS, help="measure this one, in this process; else all, in others")
    parser.add_argument("--quick", action="store_true", help="2 experts, one round of 2 calls: a check that it runs")
    parser.add_argument("--output", type=Path, help="write the figures to this JSON file")
    parser.add_argument("--write-docs", action="store_true", help="docs/performance.md")
    options = parser.parse_args()
    if options.quick:
        options.experts, options.rounds, options.calls = 2, 1, 2
    numbers = (options.experts, options.rounds, options.calls)
    if options.backend:
        os.environ[VARIABLE] = options.backend
        print(json.dumps({source: measure(source, *numbers) for source in SOURCES}))
        return
    figures = {backend: in_process(backend, *numbers) for backend in BACKENDS}
    show(figures)
    if options.output:
        options.output.write_text(json.dumps(figures, indent=2))
    if options.write_docs:
        page, command = pages.DOCS / "performance.md", "python -m benchmarks.torch_adapter --write-docs"
        pages.put(page, command, [pages.table(("", *COLUMNS), rows(figures))])


def in_process(backend: str, experts: int, rounds: int, calls: int) -> dict[str, Any]:
    """The figures of one backend, from a process of its own."""
    numbers = {"--backend": backend, "--experts": experts, "--rounds": rounds, "--calls": calls}
    command = [
        sys.executable,
        "-m",
        "benchmarks.torch_adapter",
        *(str(word) for option in numbers.items() for word in option),
    ]
    figures: dict[str, Any] = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    return figures


def measure(source: str, experts: int, rounds: int, calls: int) -> dict[str, float]:
    """Figures of both adapters; the largest peaks, and median times."""
    hf = checkpoint(source, experts)
    nbytes = sum(tensor.nbytes for tensor in hf.values())
    first = {name: call(adapter, hf, experts) for name, adapter in ADAPTERS.items()}
    check(first["ours"].native, first["nemo"].native)
    started = first["nemo"].seconds / first["ours"].seconds
    first.clear()
    made: dict[str, list[list[Call]]] = {name: [] for name in ADAPTERS}
    for _ in range(rounds):
        for name, adapter in ADAPTERS.items():
            made[name].append([call(adapter, hf, experts)._replace(native={}) for _ in range(calls)])
    turn, row = ({name: median(rows, part) for name, rows in made.items()} for part in (slice(1), slice(1, None)))
    peaks = {name: max(one.peak for row in rows for one in row) for name, rows in made.items()}
    return {
        "nemo_gb_per_s": nbytes / row["nemo"] / 1e9,
        "ours_gb_per_s": nbytes / row["ours"] / 1e9,
        "ratio": row["nemo"] / row["ours"],
        "first_call_ratio": started,
        "turn_ratio": turn["nemo"] / turn["ours"],
        "nemo_peak": peaks["nemo"],
        "ours_peak": peaks["ours"],
    }


def median(rows: list[list[Call]], part: slice) -> float:
    """Of the seconds of the calls in this part of each row."""
    return statistics.median(one.seconds for row in rows for one in row[part])


class Call(NamedTuple):
    """One `from_hf`: its seconds, its peak over the size of its output, and its result."""

    seconds: float
    peak: float
    native: Tensors


def call(kind: Any, hf: Tensors, experts: int) -> Call:
    """One `from_hf` of tensors of its own."""
    moe = SimpleNamespace(n_routed_experts=experts, moe_inter_dim=INTER, expert_activation="swiglu", expert_bias=False)
    backend = SimpleNamespace(experts="torch", dispatcher="torch")
    adapter = kind(SimpleNamespace(hidden_size=HIDDEN), moe, backend, dtype=torch.bfloat16)
    memory.return_freed()
    before = status_bytes("VmRSS")
    tensors = {key: tensor.clone() for key, tensor in hf.items()}
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark begins anew
    started = time.perf_counter()
    native = adapter.from_hf(tensors)
    took = time.perf_counter() - started
    return Call(took, (status_bytes("VmHWM") - before) / sum(tensor.nbytes for tensor in native.values()), native)


def checkpoint(source: str, experts: int) -> Tensors:
    """The experts of one layer, random: FP8 codes and scales, or bf16 weights."""
    torch.manual_seed(0)
    found = {}
    for expert in range(experts):
        for name, shape in (("w1", (INTER, HIDDEN)), ("w3", (INTER, HIDDEN)), ("w2", (HIDDEN, INTER))):
            key = f"model.layers.0.block_sparse_moe.experts.{expert}.{name}.weight"
            if source == "fp8":
                found[key] = torch.randint(0, 120, shape, dtype=torch.uint8).view(torch.float8_e4m3fn)
                found[key + "_scale_inv"] = torch.rand(shape[0] // BLOCK, shape[1] // BLOCK)
            else:
                found[key] = torch.randn(shape, dtype=torch.bfloat16)
    return found


def check(ours: Tensors, theirs: Tensors) -> None:
    """Our result must equal NeMo's bit for bit."""
    differing = sorted(ours.keys() ^ theirs.keys())
    differing += [key for key in ours.keys() & theirs.keys() if not same_bits(ours[key], theirs[key])]
    if differing:
        raise SystemExit(f"{differing} differ from NeMo AutoModel's: no figures")


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(
        one.contiguous().view(torch.int16), other.contiguous().view(torch.int16)
    )


def status_bytes(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


def show(figures: dict[str, Any]) -> None:
    print(f"{'from_hf of torch tensors':26}" + "".join(f"{title:>8}" for title in COLUMNS))
    for name, *numbers in rows(figures):
        print(f"{name:26}" + "".join(f"{number:>8}" for number in numbers))


def rows(figures: dict[str, Any]) -> Iterator[list[str]]:
    for backend, sources in figures.items():
        for source, row in sources.items():
            yield [f"{backend}, {source}", *(f"{row[name]:.2f}" for name in COLUMNS.values())]


if __name__ == "__main__":
    main()
