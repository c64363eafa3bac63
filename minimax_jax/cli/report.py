"""`minimax-jax report`."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import click

from minimax_jax.cli import options
from minimax_jax.cli.group import command
from minimax_jax.console import Output


@command(
    examples="""
    minimax-jax report MiniMax-M2                           report.html: norms, scales, codes, outliers, findings
    minimax-jax report hf://MiniMaxAI/MiniMax-M2 -o m2.html
    minimax-jax report MiniMax-M2 my-finetune               which experts a training run moved
    minimax-jax report my-export-bf16 my-export-fp8         what quantising to FP8 has cost
    """
)
@click.argument("path", type=options.PLACE)
@click.argument("other", type=options.PLACE, required=False)
@click.option("-o", "--output", type=options.PATH, default="report.html", show_default=True, help="The page to write.")
@options.workers
@options.ignore
@options.leave_out
def report(path: str | Path, other: str | Path | None, output: Path, out: Output, **chosen: Any) -> None:
    """Write what a checkpoint holds as one HTML page, in any layout; with OTHER, what changed from PATH to it.

    Every weight is read once. The page opens from the disk, fetches nothing, and replaces an earlier page alone.
    """
    from minimax_jax.jobs import overview_report
    from minimax_jax.page import report as reporting

    with out.progress("report") as listener:
        seen = reporting.report(path, other, output=output, progress=listener, **chosen)
    most = None if out.verbose else overview_report.SHOWN
    out.show(
        functools.partial(overview_report.document, page=output),
        functools.partial(overview_report.view, page=output, top=most),
        seen,
    )
