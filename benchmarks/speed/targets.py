"""What the project wants to reach, and whether this run did."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from benchmarks.speed import files, memory
from benchmarks.speed.rounds import Figures

Found = Mapping[tuple[str, str], Figures]


@dataclass(frozen=True, kw_only=True)
class Target:
    """One of them: a ratio or a number that is to be `at_least` or `at_most` so much; one of the two is None."""

    name: str
    measured: float
    at_least: float | None = None
    at_most: float | None = None
    unit: str = "x"

    @property
    def met(self) -> bool:
        """Whether it was reached."""
        if self.at_least is not None:
            return self.measured >= self.at_least
        return self.at_most is not None and self.measured <= self.at_most

    @property
    def wanted(self) -> str:
        """In words."""
        bound, number = ("at most", self.at_most) if self.at_least is None else ("at least", self.at_least)
        return f"{bound} {number:g}{self.unit}"


def ratio(fast: Figures, slow: Figures) -> float:
    """How many times the bytes a second of `slow` those of `fast` are: the median of the ratios within each round."""
    per_byte = ([seconds / one.contestant.nbytes for seconds in one.seconds] for one in (slow, fast))
    return statistics.median(slow_time / fast_time for slow_time, fast_time in zip(*per_byte, strict=True))


def targets(found: Found, alone: Mapping[str, Mapping[str, Any]]) -> Iterator[Target]:
    """All of them.

    Args:
        found: by section and name.
        alone: what was found in processes of their own, by task.
    """
    yield from _in_memory(found)
    yield from _file_to_file(found)
    peak_mb = max(one["peak_bytes"] for task, one in alone.items() if task.startswith("convert")) / 1e6
    yield Target(name="peak memory over the imports, file to file", measured=peak_mb, at_most=300, unit=" MB")
    yield Target(name="planning the full checkpoint", measured=alone["plan"]["all of it"], at_most=2, unit=" s")
    start = alone["start"]
    measured = start["import minimax_jax after jax"]
    yield Target(name="import minimax_jax over import jax", measured=measured, at_most=0.25, unit=" s")
    yield Target(name="minimax-jax --help", measured=start["--help"], at_most=0.3, unit=" s")


def _in_memory(found: Found) -> Iterator[Target]:
    one = {name: figures for (section, name), figures in found.items() if section == memory.DEQUANTISE}
    what = "dequantise + group, reused buffers"
    yield Target(name=f"{what}, over NeMo", measured=ratio(one[memory.REUSED], one[memory.NEMO]), at_least=20)
    bound = ratio(one[memory.REUSED], one[memory.STREAM])
    yield Target(name=f"{what}, of a memory stream, which bounds a single pass", measured=bound, at_least=0.5)
    fresh = ratio(one[memory.FRESH], one[memory.NEMO])
    yield Target(name="dequantise + group, fresh outputs, over NeMo", measured=fresh, at_least=10)
    back = {name: figures for (section, name), figures in found.items() if section == memory.QUANTISE}
    for name, of in ((memory.REUSED, ""), (memory.RANDOM_CODES, " of weights of random codes")):
        what, one = f"ungroup + quantise{of}", back[name]
        yield Target(name=f"{what}, over torch", measured=ratio(one, back[memory.TORCH]), at_least=15)
        bound = ratio(one, back[memory.STREAM_BACK])
        yield Target(name=f"{what}, of a memory stream", measured=bound, at_least=0.5)


def _file_to_file(found: Found) -> Iterator[Target]:
    for section, least in ((files.WARM, 0.7), (files.COLD, 0.9)):
        one = {name: figures for (where, name), figures in found.items() if where == section}
        copied = ratio(one[files.TO_BF16], one[files.COPY_TWICE])
        yield Target(name=f"{section}, bf16, of a copy of as many bytes", measured=copied, at_least=least)
        for name in (files.TO_FP8, files.BACK):
            measured = ratio(one[name], one[files.COPY])
            yield Target(name=f"{section}, {name}, of a copy", measured=measured, at_least=0.8)
    warm = found[files.WARM, files.TO_BF16]
    nemo = ratio(warm, found[files.WARM, files.NEMO])
    yield Target(name="file to file, warm, bf16, over NeMo", measured=nemo, at_least=12)
