"""What becomes of the block scales of a source, in words: where a conversion leaves them behind, or derives others."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from minimax_jax.display import counted
from minimax_jax.errors import argument
from minimax_jax.jobs.source import SIDECAR, Source
from minimax_jax.layout.specs import Entry
from minimax_jax.layout.table import SCALE_SUFFIX

Level: TypeAlias = Literal["note", "warning"]

_FP8 = "F8_E4M3"


@dataclass(frozen=True, kw_only=True, slots=True)
class Remark:
    """What there is to know of a conversion.

    Attributes:
        level: whether it is something to know, or to look into.
        text: one line.
    """

    level: Level
    text: str


def scales_of(entry: Entry, source: Source) -> bool:
    """Whether a source has block scales of an entry: its own, or those that its sidecar kept."""
    own = source.survey.dtypes[entry.native] == _FP8
    return entry.row.scaled and (own or entry.native + SCALE_SUFFIX in source.sidecar)


def scale_remarks(source: Source, dtype: str, *, beside: bool, all_fresh: bool = False) -> Iterator[Remark]:
    """What there is to know of block scales.

    Args:
        source: what is converted.
        dtype: stored dtype of block-scaled weights in the output.
        beside: whether the target keeps the scales of its source beside float weights.
        all_fresh: whether the work has been done, and every weight that it quantised got new scales.
    """
    scaled = [entry for entry in source.survey.entries if entry.row.scaled]
    having = [entry for entry in scaled if scales_of(entry, source)]
    if dtype != _FP8:
        if having and not beside:
            yield Remark(level="note", text=_left_behind(having))
    elif not having:
        yield Remark(level="warning", text=_NONE_THERE)
    elif all_fresh and not any(source.survey.dtypes[entry.native] == _FP8 for entry in scaled):
        yield Remark(level="warning", text=_ALL_CHANGED)


_NONE_THERE = (
    "no source scale is kept: the source has none, so all FP8 weights get fresh ones (amax / 448 of each block), and "
    f"codes to go with them; a native copy of the FP8 checkpoint, with {SIDECAR} in it, gives the published bytes back"
)
_ALL_CHANGED = (
    "no source scale was kept: those beside the source give none of its weights back, so all were changed, or the "
    "scales are another checkpoint's; all got fresh ones (amax / 448 of each block)"
)


def _left_behind(having: list[Entry]) -> str:
    count = len(list(itertools.chain(*(keys for entry in having for keys in entry.keys))))
    what = f"the block scales of {counted(count, 'weight')} are not kept"
    return f"{what}: a later FP8 export of this copy derives new ones; {argument('to', 'native')} keeps them"


def remarks_json(remarks: tuple[Remark, ...]) -> list[dict[str, Any]]:
    """Remarks as plain values."""
    return [{"level": remark.level, "text": remark.text} for remark in remarks]
