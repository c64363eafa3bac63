"""`minimax-jax plan`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from minimax_jax.cli import options
from minimax_jax.cli.group import EXIT_DIFFERENT, command
from minimax_jax.console import Output


@command(
    examples="""
    minimax-jax plan MiniMax-M2                                     to bf16 grouped experts
    minimax-jax plan MiniMax-M2 --to orbax --dtype fp8              FP8 in the files of Orbax
    minimax-jax plan MiniMax-M2 --probe /data/m2-native             how long it takes there, and whether it fits
    minimax-jax plan hf://MiniMaxAI/MiniMax-M2 --dtype fp8 --mesh expert=8,tensor=4
    """
)
@click.argument("src", type=options.PLACE)
@options.conversion
@click.option(
    "--probe",
    "destination",
    metavar="DST",
    type=options.PATH,
    help="The folder that the conversion would write: measure how fast SRC is read and the disk of DST written, and "
    "whether there is room. It takes seconds; DST is not made, and nothing is left behind.",
)
@click.option(
    "--mesh",
    type=options.MeshShape(),
    metavar="AXIS=N,...",
    help="Devices to load SRC onto: what each holds and reads, and what does not divide.",
)
def plan(src: str | Path, destination: Path | None, mesh: dict[str, int] | None, out: Output, **bounds: Any) -> None:
    """What a conversion would read and write, and the memory it needs; nothing is written.

    Exits with 1 where the disk of --probe has no room for it, or SRC cannot be loaded onto --mesh.
    """
    from minimax_jax.jobs import front, report
    from minimax_jax.jobs.probe import probe

    made = front.plan(src, **bounds)
    probed = None if destination is None else probe(made, destination)
    document: dict[str, Any] = report.plan_json(made) | {"probe": None, "mesh": None}
    views, fits = list(report.plan_view(made, everything=out.verbose)), True
    if probed is not None:
        document["probe"], fits = report.probe_json(probed), probed.fits
        views += report.probe_view(probed)
    if mesh is not None:
        from minimax_jax.models import mesh_report
        from minimax_jax.models.mesh_plan import mesh_plan

        meshed = mesh_plan(made.source, mesh, dtype=made.dtype)
        document["mesh"], fits = mesh_report.document(meshed), fits and meshed.loads
        views += mesh_report.view(meshed)
    out.show(lambda _: document, lambda _: views, made)
    if not fits:
        raise click.exceptions.Exit(EXIT_DIFFERENT)
