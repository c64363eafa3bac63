"""Fills the arrays of a conversion to Orbax on several threads; goes on where an earlier run of it stopped.

The journal is begun when the arrays are laid out, on the disk: a layout without records is nobody's loss. Each record
names the layout that it was made in, so one that is damaged is known, and made anew with all that was in it.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

from minimax_jax.errors import JobError
from minimax_jax.io.files import io_errors
from minimax_jax.io.journal import Journal
from minimax_jax.io.orbax_rows import Rows, digest_of_layout, lay_out, remove_broken_chunks
from minimax_jax.jobs.orbax_plan import OrbaxPlan
from minimax_jax.jobs.orbax_worker import LAYOUT, OrbaxWorker
from minimax_jax.jobs.records import Check, Record, noted, require_true, work
from minimax_jax.jobs.stamp import stamp
from minimax_jax.layout.forms import NESTED
from minimax_jax.progress import Ticker
from minimax_jax.trees import nest


def fill(plan: OrbaxPlan, folder: Path, form: str, check: Check, ticker: Ticker) -> Mapping[str, Record]:
    """Do all units of a plan, but for those that are found done.

    Args:
        plan: what to do.
        folder: empty, or with what an earlier run left; the journal stands beside it.
        form: the target.
        check: which units to read back at the end.
        ticker: told after each unit.

    Returns:
        The records of all units, by name.

    Raises:
        JobError: the unfinished work of another job stands here; a write failed; what was read back is not what was
            written.
        FormatError: the source changed or ends too early while it is read.
        NumericError: a weight to be quantised holds NaN or infinity.
    """
    target = f"{form} {plan.dtype}"
    mine = stamp(plan.source, target=target, config=plan.config, division={"arrays": plan.division})
    layout, found = _laid_out(plan, folder, noted(folder, mine))
    with Journal(folder.parent, mine) as journal, plan.source.reader() as reader:
        arrays = {spec.key: Rows(folder, spec.key) for spec in plan.specs}
        worker = OrbaxWorker(plan, reader, arrays, journal, found, layout)
        # A chunk is on the disk when it is written: TensorStore sees to it (file_io_sync).
        work(
            worker.do,
            plan.units,
            plan.workers,
            after=lambda unit: ticker.tick(unit.read_bytes),
            sync=journal.sync,
        )
        reader.require_unchanged()
        require_true(worker, plan.units, check, folder)
    return worker.records


def _laid_out(plan: OrbaxPlan, folder: Path, known: Mapping[str, Record]) -> tuple[str, Mapping[str, Record]]:
    """The digest of the layout that is there, made anew where it is not whole, and the records that speak of it."""
    layout = digest_of_layout(folder)
    found = {name: record for name, record in known.items() if record.get(LAYOUT) == layout}
    if found:
        remove_broken_chunks(folder, plan.specs, chunks=plan.chunks)
        return layout, found
    with io_errors(JobError, "what was left cannot be removed", folder):
        for left in folder.parent.iterdir():
            if left.is_dir() and left.name.startswith(folder.name):  # with what Orbax had not named yet
                shutil.rmtree(left)
    lay_out(folder, plan.specs, chunks=plan.chunks, nest=nest if plan.layout in NESTED else dict)
    return digest_of_layout(folder), found
