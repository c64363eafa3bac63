"""A checkpoint in memory: whole as a tree of views, or one leaf at a time."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from minimax_jax.io.reader import Reader
from minimax_jax.jobs.left_out import warn_of
from minimax_jax.jobs.source import Source, open_source
from minimax_jax.layout.arrangement import arrange
from minimax_jax.layout.forms import FORMS
from minimax_jax.layout.specs import Entry
from minimax_jax.layout.table import SCALE_SUFFIX
from minimax_jax.leaves import Leaf, load, native_leaf, restored
from minimax_jax.ops.checks import Array
from minimax_jax.ops.workspace import empty


def read_tree(path: str | Path, *, ignore: Collection[str] = (), leave_out: Collection[str] = ()) -> dict[str, Leaf]:
    """All tensors of a checkpoint as numpy views of the files, after the same checks as any other job makes.

    Args:
        path: a folder, or one safetensors file with a config.json beside it.
        ignore: attributes of config.json to leave unread.
        leave_out: what the names of tensors to leave out begin with; as in `open_source`.

    Returns:
        Read-only views by the checkpoint's own names. A Hugging Face checkpoint gives what `from_hf` takes, a native
        one what `to_hf` takes (FP8 weights as `BlockScaled`), one of a further layout what `from_layout` takes. Pages
        are read when they are used.

    Raises:
        CheckpointError: as `open_source`.

    Examples:
        >>> mj.synthesize("MiniMax-M2")
        >>> tree = mj.read_tree("MiniMax-M2")
        >>> tree["model.layers.0.block_sparse_moe.experts.0.w1.weight"].dtype
        dtype(float8_e4m3fn)
    """
    source = open_source(path, ignore=ignore, leave_out=leave_out)
    warn_of(source.left_out)
    with source.reader() as reader:
        views = {key: reader.view(info) for key, info in source.checkpoint.tensors.items()}
    if source.survey.layout != "native":
        return dict(views)
    return {entry.native: native_leaf(entry, views) for entry in source.survey.entries}


def read_leaf(source: Source, reader: Reader, entry: Entry, first: int, dtype: np.dtype[Any] | None = None) -> Leaf:
    """Some experts of an entry (`first` is the first of them) as a native leaf.

    `dtype` is what FP8 weights are dequantised to; None keeps them. What is read lies in the thread's workspace, if it
    has an active one.
    """
    if source.survey.layout == "hf":
        wanted = (source.checkpoint.tensors[spec.key] for spec in source.specs(entry))
        tensors = reader.read_many(wanted, empty=empty)
        return load(entry, tensors, dtype)
    infos, rows = source.checkpoint.tensors, rows_of(entry, first)
    if source.survey.layout in FORMS:
        return native_leaf(entry, _read_further(source, reader, entry, first))
    return native_leaf(
        entry, {spec.key: reader.read(infos[spec.key], *rows, empty=empty) for spec in source.specs(entry)}
    )


def read_rows(source: Source, reader: Reader, entry: Entry, start: int, stop: int) -> npt.NDArray[Any]:
    """Rows of the native tensor of an entry that is neither grouped nor block-scaled, as a fresh array."""
    layout = source.survey.layout
    if layout not in FORMS:
        (spec,) = source.specs(entry)
        return reader.read(source.checkpoint.tensors[spec.key], start, stop)
    place = arrange(entry, layout, rows=stop - start)
    if place.row_axis is None:
        return np.ascontiguousarray(_read_further(source, reader, entry, 0)[entry.native][start:stop])
    (name,) = place.names
    box = reader.read_region(source.checkpoint.tensors[name], place.region(start))
    return np.ascontiguousarray(restored(entry, {name: box}, layout, rows=stop - start)[entry.native])


def _read_further(source: Source, reader: Reader, entry: Entry, first: int) -> dict[str, Array]:
    """The stored native tensors of some experts of an entry, from a further layout."""
    layout, infos = source.survey.layout, source.checkpoint.tensors
    boxes: dict[str, Array] = {}
    for scales in (False, True) if source.survey.dtypes[entry.native] == "F8_E4M3" else (False,):
        place = arrange(entry, layout, scales=scales)
        for name in (name + SCALE_SUFFIX * scales for name in place.names):
            boxes[name] = reader.read_region(infos[name], place.region(first if entry.row.grouped else 0))
    return restored(entry, boxes, layout)


def rows_of(entry: Entry, first: int) -> tuple[int, int] | tuple[None, None]:
    """The rows of a native tensor that hold some experts of an entry; all of one that does not group."""
    return (first, first + entry.experts) if entry.row.grouped else (None, None)
