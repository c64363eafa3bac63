"""Conversions to be killed and broken: each with the bytes that it has to give, and the moments that it comes by."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from minimax_jax import synthetic
from minimax_jax.io import points
from minimax_jax.jobs import front
from trials.outcome import Child, files, in_child

OPTIONS: dict[str, dict[str, Any]] = {
    "native bf16": {"to": "native", "dtype": "bf16", "workers": 2, "shard_bytes": 300_000, "certify": True},
    "transformers-v5 bf16": {"to": "transformers-v5", "dtype": "bf16", "workers": 2, "shard_bytes": 300_000},
    "maxtext bf16": {"to": "maxtext", "dtype": "bf16", "workers": 2, "certify": True},
    "orbax fp8": {"to": "orbax", "dtype": "fp8", "workers": 2, "certify": True},
    "dcp bf16": {"to": "dcp", "dtype": "bf16", "workers": 2},
    "native fp8": {"to": "native", "dtype": "fp8", "workers": 1, "shard_bytes": 300_000, "certify": True},
    "hf bf16": {"to": "hf", "dtype": "bf16", "workers": 3, "shard_bytes": 300_000, "certify": True},
    "transformers-v5 fp8": {"to": "transformers-v5", "dtype": "fp8", "workers": 2, "shard_bytes": 300_000},
}
"""What is converted to what; with a certificate as by the command, and without."""

QUICK = tuple(OPTIONS)[:3]


@dataclass(frozen=True, kw_only=True)
class Job:
    """A conversion with the bytes that it has to give.

    Attributes:
        seconds: how long it takes undisturbed, from the call to the end of the process.
        moments: how often each named moment is reached.
    """

    name: str
    run: Callable[[Path], None]
    expected: dict[str, bytes]
    seconds: float
    moments: dict[str, int]


def jobs(folder: Path, *, names: Sequence[str] = tuple(OPTIONS), **changes: Any) -> list[Job]:
    """Jobs on a checkpoint in `folder / "hf"`, each run once undisturbed; with changes of their options."""
    folder.mkdir()
    in_child(partial(_synthesize, folder / "hf"))
    return [_job(name, folder, OPTIONS[name] | changes) for name in names]


def convert(source: Path, options: dict[str, Any], out: Path) -> None:
    """What a job runs; it tells nothing, as there is nothing to tell the parent of a child."""
    front.convert(source, out, **options)


def _synthesize(folder: Path) -> None:
    synthetic.synthesize(folder, synthetic.config(layers=2, experts=4), shard_bytes=50_000)


def _job(name: str, folder: Path, options: dict[str, Any]) -> Job:
    run = partial(convert, folder / "hf", options)
    expected = folder / f"undisturbed {name}"
    in_child(partial(run, expected))  # what is compiled for the first time is found in the cache later
    moments = in_child(partial(counted, run, folder / f"counted {name}"))
    child = Child(partial(run, folder / f"timed {name}"))
    child.begun()
    began = time.monotonic()
    child.ended()
    return Job(
        name=name,
        run=run,
        expected=files(expected),
        seconds=time.monotonic() - began,
        moments=moments,
    )


def counted(run: Callable[[Path], None], out: Path) -> dict[str, int]:
    """Run; how often each named moment was reached."""
    counts: dict[str, int] = {}

    def count(name: str) -> None:
        counts[name] = counts.get(name, 0) + 1

    points.on_reach = count
    run(out)
    return counts
