"""`minimax-jax synth`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from minimax_jax.cli import options
from minimax_jax.cli.group import command
from minimax_jax.console import Output


@command(
    examples="""
    minimax-jax synth tiny                                     under 1 MB
    minimax-jax synth layer --real --layers 1                  one real layer, 3.6 GB
    minimax-jax synth whole --real --sparse                    all 230 GB, in a few MB of disk
    """
)
@click.argument("dst", type=options.PATH)
@click.option("--real", is_flag=True, help="The published sizes; a tiny model otherwise.")
@click.option("--layers", type=click.IntRange(min=1), help="Instead of the size's own.")
@click.option("--experts", type=click.IntRange(min=1), help="Instead of the size's own.")
@click.option("--dtype", type=click.Choice(options.DTYPES), default="fp8", show_default=True)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True)
@options.shard_size
@click.option("--sparse", is_flag=True, help="Headers alone: files of full size that take no room, and read as zeros.")
def synth(
    dst: Path, real: bool, layers: int | None, experts: int | None, dtype: str, out: Output, **chosen: Any
) -> None:
    """Write a made-up checkpoint in the exact published layout into the new folder DST."""
    from minimax_jax import synthetic
    from minimax_jax.jobs import front, report, targets

    config = synthetic.config(real=real, layers=layers, experts=experts)
    with out.progress("synth") as listener:
        synthetic.synthesize(dst, config, scaled=targets.STORED[dtype], progress=listener, **chosen)
    out.show(report.inspection_json, report.inspection_view, front.inspect(dst))
