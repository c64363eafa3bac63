"""`minimax-jax generate`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from minimax_jax.cli import options
from minimax_jax.cli.group import command
from minimax_jax.console import Output


@command(
    examples="""
    minimax-jax generate m2-native --prompt-ids 1,2,3
    minimax-jax generate m2-native --prompt-ids 1,2,3 --prompt-ids 7,8 --temperature 1 --seed 7
    """
)
@click.argument("path", type=options.PLACE)
@click.option("--prompt-ids", "prompts", type=options.Ids(), multiple=True, required=True, help="Once for each prompt.")
@click.option("--max-new-tokens", type=click.IntRange(min=1), default=16, show_default=True)
@click.option("--temperature", type=click.FloatRange(min=0), default=0.0, show_default=True, help="0: the likeliest.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True)
@click.option(
    "--dtype", type=click.Choice(options.DTYPES), default="fp8", show_default=True, help="Of weights on the device."
)
@options.ignore
@options.leave_out
def generate(path: str | Path, out: Output, **chosen: Any) -> None:
    """Continue prompts of token ids with the model in PATH, over all devices of this machine: a smoke test."""
    from minimax_jax.models.smoke import smoke_test

    with out.progress("load") as listener:
        rows = smoke_test(path, progress=listener, **chosen)
    out.show(lambda rows: {"tokens": rows}, lambda rows: [",".join(map(str, row)) for row in rows], rows)
