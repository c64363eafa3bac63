"""What a person looks at, and what `--json` prints: each result of a job as rich renderables and as plain values."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.table import Table
from rich.text import Text

from minimax_jax.display import counted, size, table_of
from minimax_jax.io.beside import LeftBehind
from minimax_jax.io.jsonfile import shown
from minimax_jax.jobs.inspect import Inspection, Tally
from minimax_jax.jobs.left_out import LeftOut, left_out_json
from minimax_jax.jobs.plan import Plan
from minimax_jax.jobs.scales import Remark, remarks_json
from minimax_jax.ops.backend import backend, tpu_kernels

if TYPE_CHECKING:
    from minimax_jax.jobs.probe import Probe
    from minimax_jax.jobs.push import Pushed
    from minimax_jax.jobs.run import Report
    from minimax_jax.jobs.streamed import StreamedPlan

_SHOWN = 20


def inspection_json(seen: Inspection) -> dict[str, Any]:
    """An inspection as plain values."""
    return {
        "path": str(seen.path),
        "layout": seen.layout,
        "files": seen.files,
        "tensors": seen.total.tensors,
        "bytes": seen.total.nbytes,
        "by_dtype": _tallies(seen.by_dtype),
        "by_kind": _tallies(seen.by_kind),
        "left_out": left_out_json(seen.left_out),
        "left_behind": _left_behind_json(seen.left_behind),
        "source_scales": {"tensors": seen.sidecar.tensors, "bytes": seen.sidecar.nbytes},
        "config": seen.config.to_dict(),
    }


def inspection_view(seen: Inspection) -> Iterator[Any]:
    """An inspection to look at."""
    config = seen.config
    yield (
        f"{seen.path}: MiniMax-M2, {seen.layout} layout, {counted(seen.total.tensors, 'tensor')}, "
        f"{size(seen.total.nbytes)}{_in_files(seen.files)}"
    )
    layers, experts = counted(config.num_hidden_layers, "layer"), counted(config.num_local_experts, "expert")
    yield (
        f"{layers}, {experts} (top {config.num_experts_per_tok}), "
        f"hidden {config.hidden_size}, expert {config.intermediate_size}, vocabulary {config.vocab_size}"
    )
    if seen.sidecar.tensors:
        kept = f"{counted(seen.sidecar.tensors, 'tensor')}, {size(seen.sidecar.nbytes)}"
        yield f"source scales for a byte-exact FP8 export: {kept}"
    yield from _left_out_view(seen.left_out)
    yield from _left_behind_view(seen.left_behind, "a conversion leaves behind")
    yield _tally_table("dtype", seen.by_dtype)
    yield _tally_table("kind", seen.by_kind)


def plan_json(plan: Plan | StreamedPlan) -> dict[str, Any]:
    """A plan as plain values; without files where another library writes them."""
    return {
        "source": str(plan.source.path),
        "source_layout": plan.source.survey.layout,
        "target_layout": plan.to,
        "target_dtype": plan.dtype,
        "units": _units(plan),
        "tensors": plan.tensors,
        "read_tensors": len(plan.source.checkpoint.tensors),
        "read_bytes": plan.read_bytes,
        "write_bytes": plan.write_bytes,
        "peak_memory_bytes": plan.peak_bytes,
        "kernels": backend(),
        "tpu_kernels": tpu_kernels(),
        "remarks": remarks_json(plan.remarks),
        "left_out": left_out_json(plan.source.left_out),
        "left_behind": _left_behind_json(plan.source.left_behind),
        "files": [
            {"name": shard.file_name, "bytes": shard.file_bytes, "tensors": list(shard.tensors)}
            for shard in ((*plan.shards, *plan.sidecar) if isinstance(plan, Plan) else ())
        ],
    }


def plan_view(plan: Plan | StreamedPlan, *, everything: bool = False) -> Iterator[Any]:
    """A plan to look at, with the first of its files or all of them."""
    checkpoint = plan.source.checkpoint
    yield f"{plan.source.path} ({plan.source.survey.layout}) to {plan.to}, weights in {plan.dtype}"
    yield from _left_out_view(plan.source.left_out)
    yield from _left_behind_view(plan.source.left_behind, "stays behind")
    yield from _remarks_view(plan.remarks)
    facts = table_of("", "")
    files = _in_files(len(checkpoint.files))
    facts.add_row("read", f"{counted(len(checkpoint.tensors), 'tensor')}, {size(plan.read_bytes)}{files}")
    facts.add_row("write", f"{counted(plan.tensors, 'tensor')}, {size(plan.write_bytes)}")
    facts.add_row("memory", f"{size(plan.peak_bytes)} at most, over what the process has at the start")
    facts.add_row("work", f"{counted(_units(plan), 'unit')}, {plan.workers} at a time, on a CPU by {backend()}")
    yield facts
    if isinstance(plan, Plan):
        yield from _files_view(plan, everything=everything)


def _in_files(count: int) -> str:
    """In how many files of safetensors; nothing of a checkpoint in others, of which its library may have any number."""
    return f" in {counted(count, 'file')}" if count else ""


def _units(plan: Plan | StreamedPlan) -> int:
    return len(plan.units) if isinstance(plan, Plan) else plan.units


def _files_view(plan: Plan, *, everything: bool) -> Iterator[Any]:
    files = table_of("file", "size", "tensors", "first tensor")
    top = len(plan.shards) if everything else _SHOWN
    for shard in (*plan.shards[:top], *plan.sidecar):
        files.add_row(shard.file_name, size(shard.file_bytes), f"{len(shard.tensors):,}", next(iter(shard.tensors)))
    yield files
    if len(plan.shards) > top:
        yield f"... and {counted(len(plan.shards) - top, 'more file')}"


def probe_json(seen: Probe) -> dict[str, Any]:
    """What a probe found, as plain values."""
    return {
        "folder": str(seen.folder),
        "free_bytes": seen.free_bytes,
        "needed_bytes": seen.needed_bytes,
        "fits": seen.fits,
        "read_bytes": seen.read_bytes,
        "read_bytes_per_second": round(seen.read_rate),
        "written_bytes": seen.written_bytes,
        "write_bytes_per_second": round(seen.write_rate),
        "seconds": None if seen.seconds is None else [round(bound, 3) for bound in seen.seconds],
    }


def probe_view(seen: Probe) -> Iterator[Any]:
    """What a probe found, to look at."""
    facts = table_of("", "")
    facts.add_row("disk", f"{size(seen.free_bytes)} free in {seen.folder}, {size(seen.needed_bytes)} needed")
    rates = f"read at {size(seen.read_rate)}/s ({size(seen.read_bytes)} tried)"
    facts.add_row("rates", f"{rates}, written at {size(seen.write_rate)}/s ({size(seen.written_bytes)} tried)")
    if seen.seconds is not None:
        least, most = map(duration, seen.seconds)
        facts.add_row("time", f"{least} to {most} at these rates; what the processor takes comes on top")
    yield facts
    if not seen.fits:
        yield warning(f"not enough room: {size(seen.needed_bytes)} are needed, {size(seen.free_bytes)} are free")


def warning(text: str) -> Text:
    """A line that stands out."""
    return Text(f"warning: {text}", style="yellow")


def duration(seconds: float) -> str:
    """Seconds in the two largest units: `2 h 05 min`."""
    whole = round(seconds)
    if whole < 100:
        return f"{seconds:.1f} s" if seconds < 9.95 and seconds != whole else f"{whole} s"
    minutes, rest = divmod(whole, 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s"


def report_json(report: Report) -> dict[str, Any]:
    """What a conversion did, as plain values."""
    return {
        "destination": str(report.destination),
        "tensors": report.tensors,
        "read_tensors": report.read_tensors,
        "read_bytes": report.read_bytes,
        "written_bytes": report.written_bytes,
        "seconds": round(report.seconds, 3),
        "kernels": report.kernels,
        "tpu_kernels": report.tpu_kernels,
        "kept_source_scales": report.kept_scales,
        "fresh_scales": list(report.fresh_scales),
        "remarks": remarks_json(report.remarks),
        "left_out": left_out_json(report.left_out),
        "left_behind": _left_behind_json(report.left_behind),
        "certified": report.certified,
    }


def report_view(report: Report) -> Iterator[Any]:
    """What a conversion did, to look at."""
    rate = size(report.read_bytes / max(report.seconds, 1e-9))
    written = f"{counted(report.tensors, 'tensor')}, {size(report.written_bytes)}"
    came = f", from {counted(report.read_tensors, 'tensor')}" if report.read_tensors else ""
    yield f"wrote {report.destination}: {written}{came}, {rate}/s read (on a CPU by {report.kernels})"
    if report.kept_scales or report.fresh_scales:
        kept, fresh = report.kept_scales, len(report.fresh_scales)
        yield f"FP8 weights: {kept:,} with their source scales, {fresh:,} with fresh ones"
    yield from _remarks_view(report.remarks)
    yield from _left_out_view(report.left_out)
    yield from _left_behind_view(report.left_behind, "left behind")
    if report.certified is not None:
        yield f"certified: sha256 {report.certified}"


def _remarks_view(remarks: Sequence[Remark]) -> Iterator[Any]:
    for remark in remarks:
        yield warning(remark.text) if remark.level == "warning" else f"note: {remark.text}"


def _left_out_view(left_out: Sequence[LeftOut]) -> Iterator[str]:
    yield from map(str, left_out)


def _left_behind_json(left_behind: Sequence[LeftBehind]) -> list[dict[str, str]]:
    return [{"name": each.name, "what": each.what} for each in left_behind]


def _left_behind_view(left_behind: Sequence[LeftBehind], begin: str) -> Iterator[str]:
    if left_behind:
        named = [f"{shown(each.name)} ({each.what})" for each in left_behind[:_SHOWN]]
        more = len(left_behind) - len(named)
        yield f"{begin}: {', '.join(named)}" + (f" and {more:,} more" if more else "")


def pushed_json(done: Pushed) -> dict[str, Any]:
    """What was uploaded, as plain values."""
    return {
        "path": str(done.folder),
        "commit": done.commit,
        "sha256": done.sha256,
        "card_written": done.card,
        "left_out": left_out_json(done.left_out),
    }


def pushed_view(done: Pushed) -> Iterator[Any]:
    """What was uploaded, to look at."""
    yield f"uploaded {done.folder}, sha256 {done.sha256}"
    yield from _left_out_view(done.left_out)
    yield Text(done.commit)


def _tallies(groups: Mapping[str, Tally]) -> dict[str, Any]:
    return {name: {"tensors": tally.tensors, "bytes": tally.nbytes} for name, tally in groups.items()}


def _tally_table(title: str, groups: Mapping[str, Tally]) -> Table:
    table = table_of(title, "tensors", "size")
    for name, tally in groups.items():
        table.add_row(name, f"{tally.tensors:,}", size(tally.nbytes))
    return table
