"""`minimax-jax inspect`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from minimax_jax.cli import options
from minimax_jax.cli.group import command
from minimax_jax.console import Output


@command(
    examples="""
    minimax-jax inspect MiniMax-M2
    minimax-jax inspect hf://MiniMaxAI/MiniMax-M2 --json
    """
)
@click.argument("path", type=options.PLACE)
@options.ignore
@options.leave_out
def inspect(path: str | Path, out: Output, **reading: Any) -> None:
    """What a checkpoint is, from its headers; all that is wrong with it otherwise."""
    from minimax_jax.jobs import front, report

    seen = front.inspect(path, **reading)
    out.show(report.inspection_json, report.inspection_view, seen)
