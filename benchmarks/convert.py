"""What the conversion costs, beside NeMo AutoModel's adapter and a plain copy of the same bytes.

All contestants run in turn, several rounds, in one process; what counts is the ratio within one run. Results are
checked for bit equality before they count. GB/s are gigabytes of FP8 source a second.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import torch
from nemo_automodel.components.models.minimax_m2.state_dict_adapter import MiniMaxM2StateDictAdapter

import minimax_jax as mj
from minimax_jax import synthetic


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--experts", type=int, default=16, help="experts of the one layer, at real shapes")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="2 experts, one round: a check that it runs")
    parser.add_argument("--output", type=Path, help="write the figures to this JSON file")
    options = parser.parse_args()
    if options.quick:
        options.experts, options.rounds = 2, 1
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as folder:
        figures = measure(Path(folder), options.experts, options.rounds)
    print(f"{'':44}{'GB/s':>8}{'x NeMo':>8}{'of copy':>8}")
    for name, figure in figures.items():
        print(f"{name:44}{figure['gb_per_s']:8.2f}{figure['ratio_to_nemo']:8.1f}{figure['ratio_to_copy']:8.2f}")
    if options.output:
        options.output.write_text(json.dumps(figures, indent=2))


def measure(folder: Path, experts: int, rounds: int) -> dict[str, dict[str, float]]:
    """Seconds of every contestant, as GB/s and ratios."""
    path = folder / "checkpoint"
    synthetic.synthesize(path, synthetic.config(real=True, layers=1, experts=experts, vocab_size=1024))
    config = mj.MiniMaxConfig.from_pretrained(path)
    hf = {name: np.array(leaf) for name, leaf in mj.read_tree(path).items()}
    nbytes = sum(leaf.nbytes for leaf in hf.values())
    contestants = {
        "NeMo AutoModel from_hf (bf16, in memory)": lambda: nemo_from_hf(hf, config),
        "from_hf (bf16, in memory)": lambda: jax.block_until_ready(mj.from_hf(hf, config, dtype=jnp.bfloat16)),
        "from_hf (FP8 kept, in memory)": lambda: jax.block_until_ready(mj.from_hf(hf, config, dtype=None)),
        "plain copy of the files": lambda: copy(path, folder / "copy"),
        "convert to native bf16, file to file": lambda: convert(path, folder / "bf16", "native", "bf16"),
        "convert to native FP8, file to file": lambda: convert(path, folder / "fp8", "native", "fp8"),
    }
    check(hf, config)
    seconds = in_turn(contestants, rounds)
    nemo, plain = seconds["NeMo AutoModel from_hf (bf16, in memory)"], seconds["plain copy of the files"]
    return {
        name: {"gb_per_s": nbytes / took / 1e9, "ratio_to_nemo": nemo / took, "ratio_to_copy": plain / took}
        for name, took in seconds.items()
    }


def in_turn(contestants: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median seconds of each contestant, after one untimed round, all in turn."""
    taken: dict[str, list[float]] = {name: [] for name in contestants}
    for round_number in range(rounds + 1):
        for name, contestant in contestants.items():
            started = time.perf_counter()
            contestant()
            if round_number:
                taken[name].append(time.perf_counter() - started)
    return {name: statistics.median(values) for name, values in taken.items()}


def nemo_from_hf(hf: dict[str, np.ndarray], config: mj.MiniMaxConfig) -> dict[str, torch.Tensor]:
    moe = SimpleNamespace(
        n_routed_experts=config.num_local_experts,
        moe_inter_dim=config.intermediate_size,
        expert_activation="swiglu",
        expert_bias=False,
    )
    backend = SimpleNamespace(experts="torch", dispatcher="torch")
    adapter = MiniMaxM2StateDictAdapter(SimpleNamespace(), moe, backend, dtype=torch.bfloat16)
    return adapter.from_hf({name: as_torch(leaf) for name, leaf in hf.items()})


def as_torch(leaf: np.ndarray) -> torch.Tensor:
    """A torch tensor over the same memory."""
    views = {"float8_e4m3fn": (np.uint8, torch.float8_e4m3fn), "bfloat16": (np.int16, torch.bfloat16)}
    if leaf.dtype.name not in views:
        return torch.from_numpy(leaf)
    carrier, dtype = views[leaf.dtype.name]
    return torch.from_numpy(leaf.view(carrier)).view(dtype)


def check(hf: dict[str, np.ndarray], config: mj.MiniMaxConfig) -> None:
    """Our bf16 tree must equal NeMo's bit for bit."""
    ours, theirs = mj.from_hf(hf, config, dtype=jnp.bfloat16), nemo_from_hf(hf, config)
    for name, tensor in theirs.items():
        expected = tensor.contiguous().view(torch.uint8).numpy()
        if not np.array_equal(np.asarray(ours[name]).view(np.uint8), expected):
            raise SystemExit(f"{name} differs from NeMo AutoModel's: no figures")


def copy(source: Path, destination: Path) -> None:
    shutil.rmtree(destination, ignore_errors=True)
    shutil.copytree(source, destination)


def convert(source: Path, destination: Path, to: str, dtype: str) -> None:
    shutil.rmtree(destination, ignore_errors=True)
    mj.convert(source, destination, to=to, dtype=dtype)


if __name__ == "__main__":
    main()
