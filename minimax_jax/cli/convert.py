"""`minimax-jax convert`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from minimax_jax.cli import options
from minimax_jax.cli.group import command
from minimax_jax.console import Output
from minimax_jax.jobs.targets import require_certifiable, why_uncertified


@command(
    examples="""
    minimax-jax convert MiniMax-M2 m2-native                   FP8 to bf16 grouped experts
    minimax-jax convert MiniMax-M2 m2-native-fp8 --dtype fp8   grouped experts that stay FP8
    minimax-jax convert m2-native m2-back --to hf-fp8          and back, byte for byte
    """
)
@click.argument("src", type=options.PLACE)
@click.argument("dst", type=options.PATH)
@options.conversion
@click.option(
    "--check",
    type=click.Choice(["none", "sample", "all"]),
    help="What to read back from the disk at the end: a sample, unless this says otherwise.",
)
@click.option("--restart", is_flag=True, help="Throw away what an unfinished run left, instead of going on with it.")
@click.option("--distributed", is_flag=True, help="Share the work with the other processes of jax.distributed.")
@click.option(
    "--certify/--no-certify",
    default=None,
    help="Whether to read DST again at the end, and leave certificate.json in it: yes, where it can be read again.",
)
@click.option("--push", "url", metavar="hf://ORG/NAME", help="Upload DST when it is done: see `push`.")
@options.private
def convert(
    src: str | Path, dst: Path, out: Output, certify: bool | None, url: str | None, private: bool, **bounds: Any
) -> None:
    """Convert the checkpoint SRC into the new folder DST, streaming. The same command again goes on after a stop."""
    from minimax_jax.jobs import after, front, report
    from minimax_jax.jobs.loading import how_to_load

    why = why_uncertified(bounds["to"])
    _require_possible(certify, url, bounds)
    if url is not None:
        after.require_pushable(url)
    with out.progress("convert") as listener:
        certified = certify is not False and why is None
        done = front.convert(src, dst, certify=certified, progress=listener, **bounds)
    lines = how_to_load(bounds["to"], bounds["dtype"], done.destination)
    told: dict[str, Any] = {"load": list(lines)}
    views = [] if why is None or certify is False else [f"certificate: none, because {why}"]
    if url is not None:
        pushed = after.push_converted(done, url, private=private, origin=str(src), ignore=bounds["ignore"])
        told["pushed"], views = report.pushed_json(pushed), list(report.pushed_view(pushed))
    out.show(lambda done: report.report_json(done) | told, lambda done: [*report.report_view(done), *views], done)
    out.hint("it is loaded by", lines)


def _require_possible(certify: bool | None, url: str | None, bounds: Mapping[str, Any]) -> None:
    """Refuse, before the long work, to certify or upload what cannot be; and to upload without a certificate."""
    if url is not None and certify is False:
        raise click.UsageError("--push uploads the certificate: leave out --no-certify")
    if url is not None and bounds["distributed"]:
        raise click.UsageError("--push is for one process: run `push` when all of them have ended")
    if url is not None or certify:
        require_certifiable(bounds["to"], asked="certify" if url is None else "push")
