"""The weights a model is made of: as shapes alone, at random, or a checkpoint's; checked before they are used."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from minimax_jax.conversion import Leaf, native_leaf
from minimax_jax.dtypes import DTYPES, FLOATS, NAMES
from minimax_jax.errors import LayoutError, Problem, raise_if
from minimax_jax.layout.config import MiniMaxConfig
from minimax_jax.layout.specs import Entry, specs
from minimax_jax.models.stack import name_problems, stack_layers
from minimax_jax.ops.assemble import encode
from minimax_jax.ops.scaled import BlockScaled


def abstract_weights(config: MiniMaxConfig, *, scaled: str = "BF16", stacked: bool = False) -> dict[str, Leaf]:
    """A native tree of `jax.ShapeDtypeStruct`s (in `BlockScaled`s for FP8), for a model that holds no memory.

    Args:
        config: the checkpoint's config.
        scaled: dtype of block-scaled weights, as in `Specs.abstract`.
        stacked: with the layers stacked, as from `stack_layers`.
    """
    table = specs(config)
    stored = table.abstract(scaled)
    tree = {entry.native: native_leaf(entry, stored) for entry in table.entries}  # type: ignore[arg-type]
    return jax.eval_shape(partial(stack_layers, config=config), tree) if stacked else tree


def random_weights(
    config: MiniMaxConfig, key: jax.Array, *, scaled: str = "BF16", std: float = 0.02
) -> dict[str, Leaf]:
    """A native tree to train from: normal matrices, norms of one, a router bias of zero.

    Args:
        config: the checkpoint's config.
        key: seed, from `jax.random.key`.
        scaled: dtype of block-scaled weights: F8_E4M3, BF16 or F32.
        std: standard deviation of the matrices; 0.02 is transformers' `initializer_range`.
    """
    entries = specs(config).entries
    keys = jax.random.split(key, len(entries))
    return {entry.native: _random(entry, own, scaled, std) for entry, own in zip(entries, keys, strict=True)}


def check_weights(native: Mapping[str, Leaf], config: MiniMaxConfig, *, stacked: bool = False) -> None:
    """Check a tree against the layout: every name, every shape, dtypes.

    Any float dtype is right for any tensor, as in a checkpoint; `BlockScaled` is right for weights that are published
    in FP8, in the blocks that grouping them gives.

    Args:
        native: leaves by native name: arrays, `jax.ShapeDtypeStruct`s or `BlockScaled`s of them.
        config: the checkpoint's config.
        stacked: whether it should have the form that `stack_layers` gives.

    Raises:
        LayoutError: everything that is missing, unexpected or of a wrong shape or dtype.
    """
    expected = abstract_weights(config, scaled="F8_E4M3", stacked=stacked)
    problems = list(name_problems(native, expected))
    for name, like in expected.items():
        if name in native:
            problems += _leaf_problems(name, native[name], like)
    raise_if(problems, LayoutError)


def _random(entry: Entry, key: jax.Array, scaled: str, std: float) -> Leaf:
    dtype = DTYPES[entry.dtype(scaled)]
    if entry.row.native_axes == ("expert",):
        return jnp.zeros(entry.shape, dtype)
    if len(entry.shape) == 1:
        return jnp.ones(entry.shape, dtype)
    matrix = std * jax.random.normal(key, entry.shape, jnp.float32)
    block = entry.block[::-1] if entry.row.grouped else entry.block
    return encode(matrix, dtype, block=block, parts=entry.parts)


def _leaf_problems(name: str, leaf: Leaf, like: Leaf) -> Iterator[Problem]:
    if not hasattr(leaf, "shape") or not hasattr(leaf, "dtype"):
        yield Problem(what="not an array", key=name, got=type(leaf).__name__)
        return
    if tuple(leaf.shape) != tuple(like.shape):
        yield Problem(what="wrong shape", key=name, expected=str(list(like.shape)), got=str(list(leaf.shape)))
    elif isinstance(leaf, BlockScaled) and isinstance(like, BlockScaled):
        if _blocks(leaf) != _blocks(like):
            yield Problem(what="wrong blocks of FP8 scales", key=name, expected=_blocks(like), got=_blocks(leaf))
    elif isinstance(leaf, BlockScaled) or NAMES.get(np.dtype(leaf.dtype)) not in FLOATS:
        got = str(leaf) if isinstance(leaf, BlockScaled) else str(leaf.dtype)
        floats = " or ".join(FLOATS)
        expected = f"{floats}, or a BlockScaled" if isinstance(like, BlockScaled) else floats
        yield Problem(what="wrong dtype", key=name, expected=expected, got=got)


def _blocks(leaf: BlockScaled) -> str:
    return f"block {leaf.block}, parts {leaf.parts}, scales {list(leaf.scale_inv.shape)}"
