"""`minimax-jax diff`."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import click

from minimax_jax.cli import options
from minimax_jax.cli.group import EXIT_DIFFERENT, command
from minimax_jax.console import Output


@command(
    examples="""
    minimax-jax diff MiniMax-M2 m2-native                   nothing: the same values in another layout
    minimax-jax diff MiniMax-M2 MiniMax-M2.1 --top 50       what a training run moved most
    minimax-jax diff m2-native my-export --rank ulp --json
    """
)
@click.argument("first", type=options.PLACE)
@click.argument("second", type=options.PLACE)
@click.option(
    "--rank",
    type=click.Choice(["relative", "ulp", "cosine", "abs"]),
    default="relative",
    show_default=True,
    help="What comes first.",
)
@click.option("--top", type=click.IntRange(min=0), default=20, show_default=True, help="How many differences to show.")
@options.sample
@options.workers
@options.ignore
@options.leave_out
def diff(first: str | Path, second: str | Path, top: int, out: Output, **chosen: Any) -> None:
    """What differs between two checkpoints, in any two layouts, the largest difference first.

    Weights are compared by value in the less precise dtype of the two. Exits with 1 on a difference.
    """
    from minimax_jax.jobs import after, diff_report

    with out.progress("diff") as listener:
        seen = after.diff(first, second, progress=listener, **chosen)
    most = None if out.verbose else top
    out.show(functools.partial(diff_report.document, top=most), functools.partial(diff_report.view, top=most), seen)
    if not seen.same:
        raise click.exceptions.Exit(EXIT_DIFFERENT)
