"""Kills, faults and bad inputs, many of each, and the table of what they gave: `docs/reliability.md`.

Conversions of a tiny checkpoint run in processes of their own. They are killed by SIGKILL at random times and at every
named moment, and run again: the bytes have to be those of an undisturbed run. The exit status is 1 if anything is not
as it has to be.
"""

from __future__ import annotations

import argparse
import gc
import os
import platform
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("MINIMAX_JAX_CPU", "xla")  # its programs are found in a cache by every child
_CACHE = tempfile.TemporaryDirectory()
os.environ["JAX_COMPILATION_CACHE_DIR"] = _CACHE.name
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"

from trials import faults, inputs, kills, teams  # noqa: E402
from trials.jobs import OPTIONS, QUICK, jobs  # noqa: E402
from trials.outcome import Outcome  # noqa: E402

import minimax_jax.jobs.orbax  # noqa: E402 - children are forked: what they need is imported once
import minimax_jax.jobs.run  # noqa: E402
import minimax_jax.jobs.verify  # noqa: E402, F401
import torch_bridge.dcp  # noqa: E402, F401
from minimax_jax.io import orbax  # noqa: E402

PARTS = ("kills", "teams", "faults", "inputs")
POLICIES = Path(__file__).parent / "trials" / "policies.md"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="few kills: a check that it runs, in half a minute")
    parser.add_argument("--kills", type=int, default=240, help="at random times")
    parser.add_argument("--losses", type=int, default=10, help="of the leader of a team, and of another process")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=PARTS, help="one part")
    parser.add_argument("--output", type=Path, help="write the note to this file")
    options = parser.parse_args(arguments)
    orbax.require()
    gc.freeze()  # else every child searches for garbage among all that was imported: half of what it does
    began = time.monotonic()
    found: dict[str, list[Outcome]] = {}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        folder.chmod(0o755)  # some children are nobody
        for part in [options.only] if options.only else PARTS:
            found[part] = []
            for outcome in outcomes(part, folder, options):
                found[part].append(outcome)
                mark = "ok  " if outcome.good else "BAD "
                print(f"{mark} {outcome.count:4} {outcome.what}: {outcome.gave}", file=sys.stderr, flush=True)
    good = all(outcome.good for part in found.values() for outcome in part)
    if options.output:
        options.output.write_text(note(found, time.monotonic() - began))
    print(f"{sum(map(len, found.values()))} rows, {'all as they have to be' if good else 'NOT all as they have to be'}")
    return 0 if good else 1


def outcomes(part: str, folder: Path, options: argparse.Namespace) -> Iterator[Outcome]:
    """The rows of one part."""
    if part == "inputs":
        yield from inputs.tried(folder)
        return
    several = OPTIONS if part == "kills" else list(OPTIONS)[:1]
    names = list(QUICK if options.quick and part == "kills" else several)
    work = jobs(folder / part, names=names)
    source, place = folder / part / "hf", folder / part
    if part == "faults":
        yield from faults.tried(work[0], source, place, every=3 if options.quick else 1)
    elif part == "teams":
        yield from teams.at_random(
            work[0], source, place, count=1 if options.quick else options.losses, seed=options.seed
        )
    else:
        yield from kills.at_moments(work, place, each=1 if options.quick else 5)
        yield from kills.at_random(work, place, count=4 if options.quick else options.kills, seed=options.seed)


TITLES = {
    "kills": "Kills: stopped, started again, compared",
    "teams": "Processes lost: one of several that share a conversion",
    "faults": "Faults: one error, nothing that looks whole, and the next run ends in the right bytes",
    "inputs": "Bad inputs: refused by name, or carried along and told",
}


def note(found: dict[str, list[Outcome]], seconds: float) -> str:
    """The note, in Markdown."""
    libraries = ", ".join(f"{name} {version(name)}" for name in ("minimax_jax", "jax", "numpy"))
    lines = [POLICIES.read_text().rstrip(), "", "## What was tried", ""]
    lines += [
        f"Written by `benchmarks/reliability.py` in {seconds:.0f} s: {libraries}, Python {platform.python_version()}.",
        "",
    ]
    lines += ["| part | tried | as it has to be |", "|---|---|---|"]
    for part, rows in found.items():
        total, good = sum(row.count for row in rows), sum(row.count for row in rows if row.good)
        lines.append(f"| {part} | {total} | {good if good < total else 'all'} |")
    for part, rows in found.items():
        lines += ["", f"### {TITLES[part]}", "", "| what | times | gave | |", "|---|---|---|---|"]
        lines += [f"| {r.what} | {r.count} | {_cell(r.gave)} | {'ok' if r.good else '**BAD**'} |" for r in rows]
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;").replace("\n", " ")


if __name__ == "__main__":
    sys.exit(main())
