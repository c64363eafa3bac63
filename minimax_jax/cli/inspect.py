"""`minimax-jax inspect`."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from minimax_jax.cli import options
from minimax_jax.cli.group import command
from minimax_jax.console import Output
from minimax_jax.layout.table import ROWS

if TYPE_CHECKING:
    from minimax_jax.jobs.source import Source


_HEAD, _DOWN = ROWS[-1].native, next(row for row in reversed(ROWS) if row.grouped).native.format(layer=0)


@command(
    examples=f"""
    minimax-jax inspect MiniMax-M2
    minimax-jax inspect hf://MiniMaxAI/MiniMax-M2 --tree
    minimax-jax inspect m2-native --tensor {_DOWN}
    minimax-jax inspect s3://bucket/m2 --tensor {_HEAD} --json
    """
)
@click.argument("path", type=options.PLACE)
@click.option("--tree", is_flag=True, help="The names as a tree; runs of equal layers and experts are folded.")
@click.option("--tensor", metavar="NAME", help="One tensor and its numbers, by its name in either layout.")
@options.workers
@options.ignore
@options.leave_out
def inspect(path: str | Path, tree: bool, tensor: str | None, workers: int, out: Output, **reading: Any) -> None:
    """What a checkpoint is, from its headers; all that is wrong with it otherwise.

    Of a tensor, the bytes are read too: the range of its values, FP8 dequantised, the largest magnitude in its blocks,
    the range of its block scales, and how many codes are zero, NaN or 448, which is as far as FP8 goes.
    """
    from minimax_jax.jobs import inspect as inspecting
    from minimax_jax.jobs import report
    from minimax_jax.jobs.source import open_source

    if tree and tensor is not None:
        raise click.UsageError("--tree shows all tensors, --tensor one: give one of them")
    source = open_source(path, **reading)
    if tensor is not None:
        _show_tensor(source, tensor, workers, out)
    elif tree:
        _show_tree(source, out)
    else:
        out.show(report.inspection_json, report.inspection_view, inspecting.inspect(source))


def _show_tree(source: Source, out: Output) -> None:
    from minimax_jax.jobs import inspect_report
    from minimax_jax.jobs.tree import tree_of

    title = f"{source.path} ({source.survey.layout})"
    nodes = tree_of(source.checkpoint.tensors)
    out.show(
        lambda nodes: {"path": str(source.path), "tree": inspect_report.tree_document(nodes)},
        lambda nodes: [inspect_report.tree_view(title, nodes)],
        nodes,
    )


def _show_tensor(source: Source, name: str, workers: int, out: Output) -> None:
    from minimax_jax.jobs import inspect_report
    from minimax_jax.jobs.tensor import describe

    with out.progress("inspect") as listener:
        facts = describe(source, name, workers=workers, progress=listener)
    view = functools.partial(inspect_report.tensor_view, everything=out.verbose)
    out.show(inspect_report.tensor_document, view, facts)
