"""The report of a checkpoint by path: what the package exports as `report`."""

from __future__ import annotations

from collections.abc import Callable, Collection
from pathlib import Path

from minimax_jax.errors import JobError, Problem
from minimax_jax.io.jsonfile import write_text_atomic
from minimax_jax.jobs.budget import DEFAULT_WORKERS
from minimax_jax.jobs.certificate import require_place
from minimax_jax.jobs.overview import Overview
from minimax_jax.jobs.source import open_sources
from minimax_jax.progress import Progress

DEFAULT_OUTPUT = "report.html"
_BEGINNING = b"<!doctype html><!-- minimax_jax report"


def report(
    path: str | Path,
    other: str | Path | None = None,
    *,
    output: str | Path = DEFAULT_OUTPUT,
    workers: int = DEFAULT_WORKERS,
    ignore: Collection[str] = (),
    leave_out: Collection[str] = (),
    progress: Callable[[Progress], None] | None = None,
) -> Overview:
    """Write what a checkpoint holds as one HTML page that opens from the disk: norms, scales, codes, biases, findings.

    Args:
        path: a checkpoint in any layout, on the disk or behind a URL.
        other: another of the same architecture: the page then begins with what changed from `path` to it. Where one of
            the two is FP8 and the other is not, that is the error of quantisation.
        output: the page; an earlier one of that name is replaced once the new one is whole, any other file is refused.
        workers: threads.
        ignore: attributes of config.json to leave unread.
        leave_out: what the names of tensors to leave out begin with; as in `open_source`.
        progress: called as the work goes on.

    Returns:
        The figures that the page shows.

    Raises:
        CheckpointError: as `open_source`; LayoutError where the two are not of the same architecture; JobError where
            the page cannot be written, or plotly and Jinja are not installed.
    """
    require_place(output, "report", _BEGINNING)
    render = _renderer()
    from minimax_jax.jobs.measure import gather  # with jax

    sources = open_sources([path] if other is None else [path, other], ignore=ignore, leave_out=leave_out)
    seen = gather(*sources, workers=workers, progress=progress)
    write_text_atomic(Path(output), render(seen))
    return seen


def _renderer() -> Callable[[Overview], str]:
    try:
        from minimax_jax.page.render import render
    except ImportError as error:
        what, remedy = "a report takes plotly and Jinja", "pip install 'minimax_jax[report]'"
        raise JobError(Problem(what=what, got=str(error), remedy=remedy)) from error
    return render
