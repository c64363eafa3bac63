"""`minimax-jax push`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from minimax_jax.cli import options
from minimax_jax.cli.group import command
from minimax_jax.console import Output


@command(
    examples="""
    minimax-jax push m2-native hf://org/name
    minimax-jax push m2-native hf://org/name --private --origin hf://MiniMaxAI/MiniMax-M2
    """
)
@click.argument("path", type=options.PATH)
@click.argument("url", metavar="hf://ORG/NAME")
@options.private
@click.option("--origin", metavar="URL", help="What PATH was converted from, for its model card.")
@options.workers
@options.ignore
@options.leave_out
def push(path: Path, url: str, out: Output, **settings: Any) -> None:
    """Upload the checkpoint PATH with its certificate and a model card, by the token that `hf auth login` has kept."""
    from minimax_jax.jobs import after, report

    with out.progress("certify") as listener:
        done = after.push(path, url, progress=listener, **settings)
    out.show(report.pushed_json, report.pushed_view, done)
