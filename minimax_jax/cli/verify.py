"""`minimax-jax verify`."""

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
    minimax-jax verify MiniMax-M2 m2-native                    the same weights, in any two layouts
    minimax-jax verify MiniMax-M2 m2-back --by bytes           the same bytes, scales included
    minimax-jax verify m2-native -o m2-native.json             a certificate for later
    minimax-jax verify m2-native --certificate m2-native.json  nothing has changed since
    """
)
@click.argument("first", type=options.PLACE)
@click.argument("second", type=options.PLACE, required=False)
@click.option("--by", type=click.Choice(["value", "bytes"]), default="value", show_default=True)
@options.sample
@click.option("--certificate", type=options.PATH, help="Hold FIRST against this certificate, byte for byte.")
@click.option(
    "-o", "--output", type=options.PATH, help="Write the certificate to this file, a new one or an earlier certificate."
)
@options.workers
@options.ignore
@options.leave_out
def verify(first: str | Path, second: str | Path | None, out: Output, **chosen: Any) -> None:
    """Compare two checkpoints, in any two layouts, and certify every tensor; or digest one.

    By value, FP8 weights are dequantised and compared in the less precise dtype of the two; by bytes, dtypes, codes and
    scales must be the same. An earlier certificate tells any bit that has changed since; the same tensors in other
    files are no difference to it, unless by bytes. Exits with 1 on a difference.
    """
    from minimax_jax.jobs import after, verify_report
    from minimax_jax.jobs.certificate import certificate

    if second is not None and chosen["certificate"] is not None:
        raise click.UsageError("--certificate takes one checkpoint")
    with out.progress("verify") as listener:
        seen = after.verify(first, second, progress=listener, **chosen)
    view = functools.partial(verify_report.verification_view, everything=out.verbose)
    written = [f"certificate written to {chosen['output']}"] if chosen["output"] is not None else []
    out.show(certificate, lambda seen: [*view(seen), *written], seen)
    if not seen.good:
        raise click.exceptions.Exit(EXIT_DIFFERENT)
