"""`minimax-jax plan`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from minimax_jax.cli import options
from minimax_jax.cli.group import command
from minimax_jax.console import Output


@command(
    examples="""
    minimax-jax plan MiniMax-M2                              to bf16 grouped experts
    minimax-jax plan m2-native --to hf-fp8 --max-memory 8GiB
    """
)
@click.argument("src", type=options.PLACE)
@options.conversion()
def plan(src: str | Path, out: Output, **bounds: Any) -> None:
    """What a conversion would read and write, and the memory it needs; nothing is written."""
    from minimax_jax.jobs import front, report

    made = front.plan(src, **bounds)
    out.show(report.plan_json, report.plan_view, made)
