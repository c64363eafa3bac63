"""What a report has found, in brief: its findings to look at, and as plain values."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from minimax_jax.display import counted, size
from minimax_jax.jobs.findings import Finding, findings
from minimax_jax.jobs.left_out import left_out_json
from minimax_jax.jobs.overview import Overview

SHOWN = 3
"""How many names are shown of a finding, unless all that it has are asked for."""


def document(seen: Overview, *, page: Path) -> dict[str, Any]:
    """As plain values; `page` is the file that was written."""
    return {
        "page": str(page),
        "bytes": page.stat().st_size,
        "checkpoints": [
            {
                "path": str(each.path),
                "layout": each.layout,
                "tensors": each.total.tensors,
                "bytes": each.total.nbytes,
                "left_out": left_out_json(each.left_out),
            }
            for each in seen.checkpoints
        ],
        "weights": len(seen.weights),
        "findings": [_finding(each) for each in findings(seen)],
    }


def _finding(each: Finding) -> dict[str, Any]:
    return {
        "level": each.level,
        "text": each.text,
        "rule": each.rule,
        "names": list(each.names),
        "count": each.count,
    }


def view(seen: Overview, *, page: Path, top: int | None = SHOWN) -> Iterator[Any]:
    """To look at, with the first `top` names of a finding; None for all that it has."""
    names = " to ".join(str(each.path) for each in seen.checkpoints)
    nbytes = sum(each.total.nbytes for each in seen.checkpoints)
    yield f"{names}: {counted(len(seen.weights), 'weight')} in {size(nbytes)}"
    for each in findings(seen):
        yield f"{each.level:>7}  {each.text}"
        shown = each.names[:top]
        yield from (f"{'':9}{name}" for name in shown)
        if each.count > len(shown):
            yield f"{'':9}... and {each.count - len(shown):,} more"
    yield f"wrote {page}, {size(page.stat().st_size)}: open it in a browser"
