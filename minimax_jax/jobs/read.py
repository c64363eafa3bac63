"""A whole checkpoint as a tree, without reading it yet."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from minimax_jax.conversion import native_leaf
from minimax_jax.io.reader import Reader
from minimax_jax.jobs.source import open_source
from minimax_jax.leaves import Leaf


def read_tree(path: str | Path, *, ignore: Collection[str] = ()) -> dict[str, Leaf]:
    """All tensors of a checkpoint as numpy views of the files, after the same checks as any other job makes.

    Args:
        path: a folder, or one safetensors file with a config.json beside it.
        ignore: attributes of config.json to leave unread.

    Returns:
        Read-only views by the checkpoint's own names. A Hugging Face checkpoint gives what `from_hf` takes, a native
        one what `to_hf` takes (FP8 weights as `BlockScaled`). Pages are read when they are used.

    Raises:
        CheckpointError: as `open_source`.
    """
    source = open_source(path, ignore=ignore)
    with Reader(source.checkpoint) as reader:
        views = {key: reader.view(info) for key, info in source.checkpoint.tensors.items()}
    if source.survey.layout == "hf":
        return dict(views)
    return {entry.native: native_leaf(entry, views) for entry in source.survey.entries}
