"""Differences between two checkpoints to look at, and as plain values."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from minimax_jax.display import counted, table_of

if TYPE_CHECKING:
    from minimax_jax.jobs.diff import Diff
    from minimax_jax.jobs.difference import Difference


def document(seen: Diff, *, top: int | None = None) -> dict[str, Any]:
    """As plain values, with the first `top` differences; None for all of them."""
    sample = seen.sample
    return {
        "first": {"path": str(seen.paths[0]), "layout": seen.layouts[0]},
        "second": {"path": str(seen.paths[1]), "layout": seen.layouts[1]},
        "same": seen.same,
        "rank": seen.rank,
        "sample": None if sample is None else {"asked": sample.asked, "entries": sample.entries, "of": sample.of},
        "weights": {"compared": seen.weights, "different": len(seen.differences)},
        "elements": {"compared": seen.elements, "different": seen.differing},
        "differences": [
            {"key": weight.key, "dtypes": list(weight.dtypes), **_figures(weight.figures)}
            for weight in seen.differences[:top]
        ],
    }


def _figures(figures: Difference) -> dict[str, Any]:
    return {
        "elements": figures.elements,
        "differing": figures.differing,
        "non_finite": figures.non_finite,
        "relative": figures.relative,
        "cosine": figures.cosine,
        "max_ulp": figures.max_ulp,
        "max_abs": figures.max_abs,
    }


def view(seen: Diff, *, top: int | None = None) -> Iterator[Any]:
    """To look at, with the first `top` differences; None for all of them."""
    (first, second), layouts = seen.paths, seen.layouts
    yield f"{first} ({layouts[0]}) and {second} ({layouts[1]}): {counted(seen.weights, 'weight')} compared by value"
    if seen.sample is not None:
        entries = f"{seen.sample.entries:,} of {counted(seen.sample.of, 'entry', 'entries')}"
        yield f"a sample ({seen.sample.asked}): {entries}"
    if seen.same:
        yield "the same"
        return
    shown = seen.differences[:top]
    table = table_of("weight", "dtypes", *_COLUMNS)
    for weight in shown:
        table.add_row(weight.key, " / ".join(weight.dtypes), *_cells(weight.figures))
    yield table
    if len(shown) < len(seen.differences):
        yield f"... and {len(seen.differences) - len(shown):,} more; --top N shows more of them"
    weights = f"{len(seen.differences):,} of {counted(seen.weights, 'weight')}"
    yield f"NOT the same: {weights} differ, in {seen.differing:,} of {counted(seen.elements, 'element')}"


_COLUMNS = ("relative", "1 - cosine", "ulp", "largest", "elements", "NaN or inf")


def _cells(figures: Difference) -> tuple[str, ...]:
    share = f"{figures.differing:,} ({figures.differing / max(figures.elements, 1):.1%})"
    return (
        f"{figures.relative:.3g}",
        f"{1 - figures.cosine:.3g}",
        f"{figures.max_ulp:,}",
        f"{figures.max_abs:.3g}",
        share,
        f"{figures.non_finite:,}" if figures.non_finite else "",
    )
