"""What a person looks at, and what `--json` prints: each result of a job as rich renderables and as plain values."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.table import Column, Table
from rich.text import Text

from minimax_jax.display import size
from minimax_jax.io.jsonfile import shown
from minimax_jax.jobs.compare import RELATIONS, Comparison
from minimax_jax.jobs.inspect import Inspection, Tally
from minimax_jax.jobs.left_out import LeftOut, left_out_json
from minimax_jax.jobs.plan import Plan
from minimax_jax.ops.backend import backend

if TYPE_CHECKING:
    from minimax_jax.jobs.certified import Held
    from minimax_jax.jobs.probe import Probe
    from minimax_jax.jobs.push import Pushed
    from minimax_jax.jobs.run import Report
    from minimax_jax.jobs.verification import Digested, LayerSummary, Verification

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
        "source_scales": {"tensors": seen.sidecar.tensors, "bytes": seen.sidecar.nbytes},
        "config": seen.config.to_dict(),
    }


def inspection_view(seen: Inspection) -> Iterator[Any]:
    """An inspection to look at."""
    config = seen.config
    yield (
        f"{seen.path}: MiniMax-M2, {seen.layout} layout, {seen.total.tensors:,} tensors, "
        f"{size(seen.total.nbytes)} in {seen.files} file{_s(seen.files)}"
    )
    layers = f"{config.num_hidden_layers} layer{_s(config.num_hidden_layers)}"
    yield (
        f"{layers}, {config.num_local_experts} experts (top {config.num_experts_per_tok}), "
        f"hidden {config.hidden_size}, expert {config.intermediate_size}, vocabulary {config.vocab_size}"
    )
    if seen.sidecar.tensors:
        yield f"source scales for a byte-exact FP8 export: {seen.sidecar.tensors} tensors, {size(seen.sidecar.nbytes)}"
    yield from _left_out_view(seen.left_out)
    yield _tally_table("dtype", seen.by_dtype)
    yield _tally_table("kind", seen.by_kind)


def plan_json(plan: Plan) -> dict[str, Any]:
    """A plan as plain values."""
    return {
        "source": str(plan.source.path),
        "source_layout": plan.source.survey.layout,
        "target_layout": plan.target.layout,
        "target_dtype": plan.target.dtype,
        "units": len(plan.units),
        "tensors": sum(len(shard.tensors) for shard in plan.shards),
        "read_bytes": plan.read_bytes,
        "write_bytes": plan.write_bytes,
        "peak_memory_bytes": plan.peak_bytes,
        "kernels": backend(),
        "left_out": left_out_json(plan.source.left_out),
        "files": [
            {"name": shard.file_name, "bytes": shard.file_bytes, "tensors": list(shard.tensors)}
            for shard in (*plan.shards, *plan.sidecar)
        ],
    }


def plan_view(plan: Plan, *, everything: bool = False) -> Iterator[Any]:
    """A plan to look at, with the first of its files or all of them."""
    yield f"{plan.source.path} ({plan.source.survey.layout}) to {plan.target.layout}, weights in {plan.target.dtype}"
    yield from _left_out_view(plan.source.left_out)
    facts = Table(show_header=False, box=None)
    facts.add_row("read", f"{size(plan.read_bytes)} in {len(plan.source.checkpoint.files)} files")
    tensors = sum(len(shard.tensors) for shard in plan.shards)
    facts.add_row("write", f"{size(plan.write_bytes)}, {tensors:,} tensors")
    facts.add_row("memory", f"{size(plan.peak_bytes)} at most, over what the process has at the start")
    facts.add_row("work", f"{len(plan.units):,} units, {plan.workers} at a time, on a CPU by {backend()}")
    yield facts
    files = Table("file", "size", "tensors", "first tensor", box=None)
    top = len(plan.shards) if everything else _SHOWN
    for shard in (*plan.shards[:top], *plan.sidecar):
        files.add_row(shard.file_name, size(shard.file_bytes), f"{len(shard.tensors):,}", next(iter(shard.tensors)))
    yield files
    if len(plan.shards) > top:
        yield f"... and {len(plan.shards) - top:,} more files"


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
    facts = Table(show_header=False, box=None)
    facts.add_row("disk", f"{size(seen.free_bytes)} free in {seen.folder}")
    rates = f"read at {size(seen.read_rate)}/s ({size(seen.read_bytes)} tried)"
    facts.add_row("rates", f"{rates}, written at {size(seen.write_rate)}/s ({size(seen.written_bytes)} tried)")
    if seen.seconds is not None:
        least, most = map(duration, seen.seconds)
        facts.add_row("time", f"{least} to {most} at these rates, what the processor takes apart")
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
        "read_bytes": report.read_bytes,
        "written_bytes": report.written_bytes,
        "seconds": round(report.seconds, 3),
        "kernels": report.kernels,
        "kept_source_scales": report.kept_scales,
        "fresh_scales": list(report.fresh_scales),
        "left_out": left_out_json(report.left_out),
    }


def report_view(report: Report) -> Iterator[str]:
    """What a conversion did, to look at."""
    rate = size(report.read_bytes / max(report.seconds, 1e-9))
    written = f"{report.tensors:,} tensors, {size(report.written_bytes)}"
    yield f"wrote {report.destination}: {written}, {rate}/s read (on a CPU by {report.kernels})"
    if report.kept_scales or report.fresh_scales:
        kept, fresh = report.kept_scales, len(report.fresh_scales)
        yield f"FP8 weights: {kept:,} with their source scales, {fresh:,} with fresh ones"
    yield from _left_out_view(report.left_out)


def verification_view(seen: Verification, *, everything: bool = False) -> Iterator[Any]:
    """A verification to look at, with the first of its differences or all of them."""
    if seen.sample is not None:
        entries = f"{seen.sample.entries:,} of {seen.sample.of:,} entries"
        yield f"a sample ({seen.sample.asked}): {entries}, the same each time; the rest was not looked at"
    for checkpoint in seen.checkpoints:
        tensors = f"{len(checkpoint.digests):,} tensors"
        yield f"{checkpoint.path} ({checkpoint.layout}): {tensors}, sha256 {checkpoint.sha256}"
        yield from _left_out_view(checkpoint.left_out)
        yield from _unusual_view(checkpoint)
    yield _layer_table(seen.layers)
    if seen.comparisons:
        counts = (f"{seen.count(name):,} {name}" for name in ("identical", "equal", "different"))
        yield f"weights: {', '.join(counts)}"
        yield from _failure_view(list(seen.failures), everything=everything)
    if seen.held is not None:
        yield from _held_view(seen.held)
    if seen.comparisons or seen.held is not None:
        by = seen.by if seen.held is None else "bytes"
        yield "the same" if seen.good else f"NOT the same by {by}"


def _left_out_view(left_out: Sequence[LeftOut]) -> Iterator[str]:
    yield from map(str, left_out)


def _unusual_view(checkpoint: Digested) -> Iterator[str]:
    found = checkpoint.unusual
    if not found:
        return
    kinds: Counter[str] = Counter()
    for each in found:
        kinds[each.what] += each.count
    counts = ", ".join(f"{count:,} {what}" for what, count in kinds.items())
    tensors = len({each.key for each in found})
    yield f"  unusual numbers: {counts}, in {tensors:,} tensor{_s(tensors)}, first {found[0].key}"


def _layer_table(layers: Sequence[LayerSummary]) -> Table:
    """A row for each layer; of two checkpoints, one for each run of layers of which the same is to be said."""
    if not layers or not layers[0].counts:
        table = Table("layer", "tensors", "sha256", box=None)
        for layer in layers:
            table.add_row(_layer_name(layer.layer), f"{layer.tensors[0]:,}", layer.sha256[0][:16])
        return table
    table = Table("layers", *RELATIONS, "elements", "largest difference", box=None)
    for facts, group in itertools.groupby(layers, key=_layer_facts):
        numbers = [layer.layer for layer in group]
        first, last = _layer_name(numbers[0]), _layer_name(numbers[-1])
        table.add_row(first if len(numbers) == 1 else f"{first} to {last}", *facts[1:])
    return table


def _layer_facts(layer: LayerSummary) -> tuple[str, ...]:
    counts = (f"{layer.counts[name]:,}" for name in RELATIONS)
    kind = "outside" if layer.layer is None else "layer"
    return (kind, *counts, f"{layer.differing:,}", f"{layer.max_abs:.3g}")


def _layer_name(layer: int | None) -> str:
    return "outside" if layer is None else str(layer)


def _failure_view(failures: Sequence[Comparison], *, everything: bool) -> Iterator[Any]:
    top = len(failures) if everything else _SHOWN
    if failures:
        table = Table(
            Column("weight", overflow="fold"), "relation", "dtypes", "elements", "largest difference", box=None
        )
        for failure in failures[:top]:
            dtypes = " / ".join(failure.dtypes)
            table.add_row(failure.key, failure.relation, dtypes, f"{failure.differing:,}", f"{failure.max_abs:.3g}")
        yield table
    if len(failures) > top:
        yield f"... and {len(failures) - top:,} more"


def _held_view(held: Held) -> Iterator[Any]:
    seen = f"{held.tensors:,} tensors, config.json, {held.files:,} file{_s(held.files)}"
    yield f"held against {held.file}, which speaks of {held.path}: {seen}"
    yield from (f"note: {note}" for note in held.notes)
    if held.mismatches:
        table = Table(Column("not as certified", overflow="fold"), "what", "expected", "got", box=None)
        for each in held.mismatches:
            told = (each.name, each.what, each.expected or "", each.got or "")
            table.add_row(*(Text(shown(text)) for text in told))  # names come from a file: no markup, nothing hidden
        yield table


def pushed_json(done: Pushed) -> dict[str, Any]:
    """What was uploaded, as plain values."""
    return {"path": str(done.folder), "commit": done.commit, "sha256": done.sha256, "card_written": done.card}


def pushed_view(done: Pushed) -> Iterator[Any]:
    """What was uploaded, to look at."""
    yield f"uploaded {done.folder}, sha256 {done.sha256}"
    yield Text(done.commit)


def certificate_view(seen: Verification) -> Iterator[Any]:
    """A verification tensor by tensor, to look at: for a small checkpoint."""
    table = Table(Column("tensor", overflow="fold"), "dtype", "shape", "sha256", box=None)
    for digest in seen.checkpoints[0].digests:
        table.add_row(digest.key, digest.dtype, str(list(digest.shape)), digest.sha256[:16])
    yield table
    yield from verification_view(seen)


def _tallies(groups: Mapping[str, Tally]) -> dict[str, Any]:
    return {name: {"tensors": tally.tensors, "bytes": tally.nbytes} for name, tally in groups.items()}


def _tally_table(title: str, groups: Mapping[str, Tally]) -> Table:
    table = Table(title, "tensors", "size", box=None)
    for name, tally in groups.items():
        table.add_row(name, f"{tally.tensors:,}", size(tally.nbytes))
    return table


def _s(count: int) -> str:
    return "" if count == 1 else "s"
