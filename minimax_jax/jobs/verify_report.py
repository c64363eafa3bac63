"""A verification to look at: what was compared, what differs, and how it stands to an earlier certificate."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.table import Table
from rich.text import Text

from minimax_jax.display import counted, table_of
from minimax_jax.io.jsonfile import shown
from minimax_jax.jobs.compare import RELATIONS, Comparison

if TYPE_CHECKING:
    from minimax_jax.jobs.held import Held, What
    from minimax_jax.jobs.verification import Digested, LayerSummary, Verification

_SHOWN = 20


def verification_view(seen: Verification, *, everything: bool = False) -> Iterator[Any]:
    """A verification to look at, with the first of its differences or all of them."""
    if seen.sample is not None:
        entries = f"{seen.sample.entries:,} of {counted(seen.sample.of, 'entry', 'entries')}"
        yield f"a sample ({seen.sample.asked}): {entries}, the same each time; the rest was not looked at"
    for checkpoint in seen.checkpoints:
        yield f"{checkpoint.path}: {_told_of(checkpoint)}, sha256 {checkpoint.sha256}"
        yield from map(str, checkpoint.left_out)
        yield from _unusual_view(checkpoint)
    yield _layer_table(seen.layers)
    if seen.comparisons:
        counts = (f"{seen.count(name):,} {name}" for name in ("identical", "equal", "different"))
        yield f"{counted(len(seen.comparisons), 'weight')}: {', '.join(counts)}"
        yield from _failure_view(list(seen.failures), everything=everything)
    if seen.held is not None:
        yield from _held_view(seen.held, everything=everything)
    if seen.comparisons or seen.held is not None:
        by = seen.by if seen.held is None else "bytes"
        yield "the same" if seen.good else f"NOT the same by {by}"


def certificate_view(seen: Verification) -> Iterator[Any]:
    """A verification tensor by tensor, to look at: for a small checkpoint."""
    table = table_of("tensor", "dtype", "shape", "sha256")
    for digest in seen.checkpoints[0].digests:
        table.add_row(digest.key, digest.dtype, str(list(digest.shape)), digest.sha256[:16])
    yield table
    yield from verification_view(seen)


def _told_of(checkpoint: Digested) -> str:
    """What was looked at: tensors go by their names in the Hugging Face form, of which a native one holds several."""
    tensors = counted(len(checkpoint.digests), "tensor")
    if checkpoint.layout == "hf":
        return f"hf layout, {tensors}"
    stored = counted(checkpoint.stored, "stored tensor")
    return f"{checkpoint.layout} layout, {stored}, in the Hugging Face form {tensors}"


def _unusual_view(checkpoint: Digested) -> Iterator[str]:
    found = checkpoint.unusual
    if not found:
        return
    kinds: Counter[str] = Counter()
    for each in found:
        kinds[each.what] += each.count
    counts = ", ".join(f"{count:,} {what}" for what, count in kinds.items())
    tensors = len({each.key for each in found})
    yield f"  unusual numbers: {counts}, in {counted(tensors, 'tensor')}, first {found[0].key}"


def _layer_table(layers: Sequence[LayerSummary]) -> Table:
    """A row for each layer; of two checkpoints, one for each run of layers of each of which the same is to be said."""
    if not layers or not layers[0].counts:
        table = table_of("layer", "tensors", "sha256")
        for layer in layers:
            table.add_row(_layer_name(layer.layer), f"{layer.tensors[0]:,}", layer.sha256[0][:16])
        return table
    table = table_of("weights by layer", *RELATIONS, "differing elements", "largest difference")
    for facts, group in itertools.groupby(layers, key=_layer_facts):
        numbers = [layer.layer for layer in group]
        first, last = _layer_name(numbers[0]), _layer_name(numbers[-1])
        table.add_row(first if len(numbers) == 1 else f"each of {first} to {last}", *facts[1:])
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
        table = table_of("weight", "relation", "dtypes", "elements", "largest difference")
        for failure in failures[:top]:
            dtypes = " / ".join(failure.dtypes)
            table.add_row(failure.key, failure.relation, dtypes, f"{failure.differing:,}", f"{failure.max_abs:.3g}")
        yield table
    if len(failures) > top:
        yield f"... and {len(failures) - top:,} more"


def _held_view(held: Held, *, everything: bool) -> Iterator[Any]:
    seen = f"{counted(held.tensors, 'tensor')}, config.json, {counted(held.files, 'file')}"
    yield f"held against {held.file}, which speaks of {held.path}: {seen}"
    yield from (f"note: {note}" for note in held.notes)
    top = len(held.mismatches) if everything else _SHOWN
    if held.mismatches:
        table = table_of("not as certified", "what", "expected", "got")
        for each in held.mismatches[:top]:
            told = (each.name, each.what, each.expected or "", each.got or "")
            table.add_row(*(Text(shown(text)) for text in told))  # names come from a file: no markup, nothing hidden
        yield table
    if len(held.mismatches) > top:
        yield f"... and {len(held.mismatches) - top:,} more; -v shows all"
    if held.mismatches:
        yield from _cause_view(held)


_DIFFERS: Mapping[What, tuple[str, str]] = {
    "dtype": ("tensor in another dtype", "tensors in another dtype"),
    "shape": ("tensor of another shape", "tensors of another shape"),
    "sha256": ("tensor of other bytes", "tensors of other bytes"),
    "missing": ("missing", "missing"),
    "extra": ("that the certificate does not have", "that the certificate does not have"),
    "file": ("file of other bytes", "files of other bytes"),
    "text": ("header with other text", "headers with other text"),
    "config": ("config.json that says something else", "config.json that say something else"),
}


def _cause_view(held: Held) -> Iterator[str]:
    """How much of what differs, a tensor counted once, and what that comes of where it shows."""
    first = {each.name: each for each in reversed(held.mismatches)}
    kinds = Counter(each.what for each in first.values())
    told = (counted(kinds[what], *words) for what, words in _DIFFERS.items() if kinds[what])
    yield f"not as certified: {', '.join(told)}"
    dtypes = {(each.expected, each.got) for each in first.values() if each.what == "dtype"}
    for expected, got in sorted(dtypes, key=str):
        yield (
            f"cause: {got} here, {expected} in the certificate, which holds for bytes as they are: take a copy of that "
            "dtype, or compare the two checkpoints by value: minimax-jax verify FIRST SECOND"
        )
