"""`minimax-jax demo`."""

from __future__ import annotations

from pathlib import Path

import click

from minimax_jax.cli import options
from minimax_jax.cli.group import EXIT_DIFFERENT, command
from minimax_jax.console import Output


@command(
    examples="""
    minimax-jax demo
    minimax-jax demo /tmp/m2-demo
    """
)
@click.argument("folder", type=options.PATH, default="minimax-demo")
def demo(folder: Path, out: Output) -> None:
    """Show it all on a tiny checkpoint in FOLDER: FP8 to native and back, byte for byte, with the certificate."""
    from minimax_jax import demo as demonstration
    from minimax_jax.jobs import report
    from minimax_jax.jobs.certificate import certificate

    seen = demonstration.run(folder, say=out.step)
    out.show(certificate, report.certificate_view, seen)
    if not seen.good:
        raise click.exceptions.Exit(EXIT_DIFFERENT)
