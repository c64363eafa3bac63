"""`minimax-jax demo`."""

from __future__ import annotations

from pathlib import Path

import click

from minimax_jax.cli import options
from minimax_jax.cli.group import EXIT_DIFFERENT, command
from minimax_jax.console import Output

FOLDER = "minimax-demo"


@command(
    examples="""
    minimax-jax demo
    minimax-jax demo /tmp/m2-demo
    """
)
@click.argument("folder", type=options.PATH, default=FOLDER)
def demo(folder: Path, out: Output) -> None:
    """Show it all on a tiny checkpoint: FP8 to native and back, byte for byte, with the certificate.

    All of it is written to FOLDER, which must be new or empty: minimax-demo, unless another is named.
    """
    from minimax_jax import demo as demonstration
    from minimax_jax.jobs import verify_report
    from minimax_jax.jobs.certificate import certificate

    seen = demonstration.run(folder, say=out.step)
    out.show(certificate, verify_report.certificate_view, seen)
    if not seen.good:
        raise click.exceptions.Exit(EXIT_DIFFERENT)
