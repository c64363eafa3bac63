"""`minimax-jax convert`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from minimax_jax.cli import options
from minimax_jax.cli.group import command
from minimax_jax.console import Output
from minimax_jax.jobs.streamed import is_source


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
@click.option("--certify", is_flag=True, help="Read DST again when it is done, and leave certificate.json in it.")
@click.option("--push", "url", metavar="hf://ORG/NAME", help="Upload DST when it is done: see `push`.")
@options.private
def convert(
    src: str | Path, dst: Path, out: Output, certify: bool, url: str | None, private: bool, **bounds: Any
) -> None:
    """Convert the checkpoint SRC into the new folder DST, streaming. The same command again goes on after a stop."""
    from minimax_jax.jobs import after, front, report
    from minimax_jax.jobs.loading import how_to_load

    _require_readable("--push" if url is not None else "--certify" if certify else None, bounds)
    if url is not None:
        after.require_pushable(url)
    with out.progress("convert") as listener:
        done = front.convert(src, dst, progress=listener, **bounds)
    lines = how_to_load(bounds["to"], bounds["dtype"], done.destination)
    told: dict[str, Any] = {"load": list(lines)}
    views: list[Any] = []
    if url is not None:  # which certifies
        with out.progress("certify") as listener:
            workers = bounds["workers"]
            pushed = after.push(dst, url, private=private, origin=str(src), workers=workers, progress=listener)
        told["pushed"], views = report.pushed_json(pushed), list(report.pushed_view(pushed))
    elif certify:
        with out.progress("certify") as listener:
            sha256 = after.certify(dst, workers=bounds["workers"], progress=listener)
        told["certified"], views = sha256, [f"certified: sha256 {sha256}"]
    out.show(lambda done: report.report_json(done) | told, lambda done: [*report.report_view(done), *views], done)
    out.hint("it is loaded by", lines)


def _require_readable(asked: str | None, bounds: Mapping[str, Any]) -> None:
    """Refuse, before the long work, what has to read the output again where this process cannot."""
    if asked is None:
        return
    if not is_source(bounds["to"]):
        raise click.UsageError(f"{asked} reads the output again, which nothing here does of {bounds['to']}")
    if bounds["distributed"]:
        raise click.UsageError(f"{asked} is for one process: run `push` or `verify` when all of them have ended")
