"""Runs a plan on several threads, inside its memory; goes on where an earlier run of it stopped."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from minimax_jax.display import Displayed
from minimax_jax.io.beside import LeftBehind
from minimax_jax.io.folder import appearing, workshop_of
from minimax_jax.io.journal import Journal, has_records
from minimax_jax.io.jsonfile import write_json_atomic
from minimax_jax.io.writer import Writer
from minimax_jax.jobs.card import add_side_files
from minimax_jax.jobs.certifying import certify_unnamed
from minimax_jax.jobs.left_out import LeftOut
from minimax_jax.jobs.plan import Plan
from minimax_jax.jobs.records import Check, Record, noted, quantised, require_true, work
from minimax_jax.jobs.scales import Remark, scale_remarks
from minimax_jax.jobs.stamp import stamp
from minimax_jax.jobs.team import FAILED, SOLO, Team
from minimax_jax.jobs.units import Unit
from minimax_jax.jobs.worker import Worker
from minimax_jax.ops.backend import Backend, TpuKernels, backend, tpu_kernels
from minimax_jax.progress import Progress, Ticker


@dataclass(frozen=True, kw_only=True, repr=False)
class Report(Displayed):
    """What a conversion did.

    Attributes:
        destination: the folder that was written.
        tensors: how many tensors it holds, the sidecar's apart.
        read_bytes: bytes of tensors read.
        written_bytes: bytes of files written, side files apart.
        seconds: wall-clock time, but for that of the certificate.
        kept_scales: weights that were quantised with their source scales, byte for byte what they were.
        fresh_scales: names of weights that were quantised with scales by amax.
        read_tensors: how many tensors the source holds; 0 where there was none, but a model in memory.
        remarks: what else there is to know, of block scales that were not kept.
        left_out: tensors in the files of the source that are not the model's: they were not converted.
        left_behind: what lies beside the weights of the source and was not taken along.
        certified: one digest of all tensors, as in the certificate that lies there; None where none was asked for.
        kernels: which code the work went through on a CPU.
        tpu_kernels: which code grouped experts went through on a TPU, if there was one.
    """

    destination: Path
    tensors: int
    read_bytes: int
    written_bytes: int
    seconds: float
    kept_scales: int
    fresh_scales: tuple[str, ...]
    read_tensors: int = 0
    remarks: tuple[Remark, ...] = ()
    left_out: tuple[LeftOut, ...] = ()
    left_behind: tuple[LeftBehind, ...] = ()
    certified: str | None = None
    kernels: Backend = field(default_factory=backend)
    tpu_kernels: TpuKernels = field(default_factory=tpu_kernels)

    def views(self) -> Iterable[Any]:
        """What there is to look at."""
        from minimax_jax.jobs.report import report_view

        return report_view(self)


def run(
    plan: Plan,
    destination: str | Path,
    *,
    check: Check = "sample",
    restart: bool = False,
    certify: bool = False,
    team: Team = SOLO,
    progress: Callable[[Progress], None] | None = None,
) -> Report:
    """Run a plan. The destination appears whole, by rename, or not at all.

    When it fails or is killed, what was done is kept beside the destination, and the same job goes on from there: what
    its journal names is read back, and done again where it is not what it was.

    Args:
        plan: what to do.
        destination: a folder that does not exist yet, or is empty.
        check: which units to read back from the disk before the destination takes its name.
        restart: throw away what an earlier run left, instead of going on with it.
        certify: read all of it again at the end, and leave a certificate in it.
        team: the processes that share the work; all of them call this with the same arguments.
        progress: called on the calling thread after each unit that falls to this process.

    Raises:
        JobError: the destination is taken, the disk too small, a write failed; the unfinished work of another job
            stands in the way; what was read back is not what was written.
        FormatError: the source changed or ends too early while it is read.
        NumericError: a weight to be quantised holds NaN or infinity.
    """
    ticker = Ticker(plan.read_bytes, progress)
    mine = _stamp(plan)
    with team.standing_together(workshop_of(destination)), _folder(destination, team, restart=restart) as folder:
        worker = _fill(plan, folder, mine, check, team, ticker)
        seconds = ticker.seconds
        certified = _certify(plan, folder, Path(destination), team, progress) if certify else None
    return dataclasses.replace(_report(plan, Path(destination), seconds, worker.records), certified=certified)


def _fill(plan: Plan, folder: Path, mine: Mapping[str, str], check: Check, team: Team, ticker: Ticker) -> Worker:
    """Make all files of the destination; the worker that did what falls to this process."""
    with ExitStack() as stack:
        if team.leads:
            noted(folder, mine)  # refuses the work of another job before anything is written
            (folder.parent / FAILED).unlink(missing_ok=True)
            add_side_files(plan.source, folder, form=plan.target.layout, dtype=plan.target.dtype)
        team.wait()
        found = noted(folder, mine)
        with team.leader_first():
            writer = stack.enter_context(Writer(folder, plan.shards, beside=plan.sidecar, resume=True))
        with Journal(folder.parent, mine, process=team.index) as journal:
            reader = stack.enter_context(plan.source.reader())
            worker = Worker(plan, reader, writer, journal, found)
            _work(worker, plan.units[team.index :: team.count], ticker, team)
        reader.require_unchanged()
        team.wait()
        if team.leads:
            _finish(worker, folder, mine, check)
    return worker


def _folder(destination: str | Path, team: Team, *, restart: bool) -> AbstractContextManager[Path]:
    """The folder to fill; the leader of a team makes it and gives it its name."""
    if team.leads:
        return appearing(destination, worth=has_records, restart=restart)
    return nullcontext(workshop_of(destination) / Path(destination).resolve().name)


def _work(worker: Worker, units: Sequence[Unit], ticker: Ticker, team: Team) -> None:
    """Do units on the plan's threads; the first error, here or in another process, stops the rest."""

    def after(unit: Unit) -> None:
        team.require_all_well(worker.writer.folder.parent)
        ticker.tick(unit.read_bytes)

    def sync() -> None:
        worker.writer.sync()
        worker.journal.sync()

    work(worker.do, units, worker.plan.workers, after=after, sync=sync)


def _finish(worker: Worker, folder: Path, mine: Mapping[str, str], check: Check) -> None:
    """Make the files whole once all units are done, by whomever; what makes a folder a checkpoint comes last."""
    plan = worker.plan
    by_all = noted(folder, mine)
    for unit in plan.units:
        name = worker.name(unit)
        if name not in worker.records and name in by_all:
            worker.adopt(unit, by_all[name])
    worker.writer.sync()
    require_true(worker, plan.units, check, folder)
    worker.writer.finish()
    write_json_atomic(folder / "config.json", plan.config.to_dict())


def _certify(
    plan: Plan, folder: Path, destination: Path, team: Team, progress: Callable[[Progress], None] | None
) -> str:
    team.wait()  # the files are whole
    unread = plan.source.config.extra
    return certify_unnamed(folder, destination, ignore=unread, workers=plan.workers, team=team, progress=progress)


def _stamp(plan: Plan) -> dict[str, str]:
    headers = b"".join(shard.header for shard in (*plan.shards, *plan.sidecar))
    target = f"{plan.target.layout} {plan.target.dtype}"
    return stamp(plan.source, target=target, config=plan.config, division={"files": headers})


def _report(plan: Plan, destination: Path, seconds: float, records: Mapping[str, Record]) -> Report:
    kept, fresh = quantised(records)
    beside, all_fresh = plan.target.keeps_scales, bool(fresh) and not kept
    return Report(
        destination=destination,
        tensors=sum(len(shard.tensors) for shard in plan.shards),
        read_bytes=plan.read_bytes,
        written_bytes=plan.write_bytes,
        seconds=seconds,
        kept_scales=kept,
        fresh_scales=fresh,
        read_tensors=len(plan.source.checkpoint.tensors),
        remarks=tuple(scale_remarks(plan.source, plan.dtype, beside=beside, all_fresh=all_fresh)),
        left_out=plan.source.left_out,
        left_behind=plan.source.left_behind,
    )
