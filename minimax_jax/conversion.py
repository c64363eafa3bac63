"""Hugging Face <-> native, as pure functions over flat trees (dicts of arrays by name): layout x ops.

Every function works on concrete arrays, and under `jax.jit`, `jax.eval_shape` and `jax.export`. Inputs are never
changed; `donate=True` deletes JAX arrays as soon as they have been used, as `jax.jit(donate_argnums=...)` does.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from minimax_jax.dtypes import NAMES
from minimax_jax.errors import LayoutError, NumericError, Problem, raise_if
from minimax_jax.layout.check import Survey, survey
from minimax_jax.layout.config import MiniMaxConfig
from minimax_jax.layout.table import SCALE_SUFFIX
from minimax_jax.leaves import Leaf as Leaf
from minimax_jax.leaves import emit as emit
from minimax_jax.leaves import emit_unchecked, native_blocks, poisoned, stored
from minimax_jax.leaves import group_scales as group_scales
from minimax_jax.leaves import load as load
from minimax_jax.leaves import native_leaf as native_leaf
from minimax_jax.leaves import recast as recast
from minimax_jax.leaves import scale_problems as scale_problems
from minimax_jax.leaves import scales_by_key as scales_by_key
from minimax_jax.ops.checks import Array, result_problems
from minimax_jax.ops.fp8 import FP8
from minimax_jax.ops.scaled import BlockScaled


def from_hf(
    hf_tree: Mapping[str, Array],
    config: MiniMaxConfig,
    *,
    dtype: DTypeLike | None = jnp.bfloat16,
    partial: bool = False,
    donate: bool = False,
) -> dict[str, Leaf]:
    """Convert Hugging Face tensors to the native layout, as NeMo AutoModel's `from_hf` does.

    FP8 weights are dequantised to `dtype`; grouped experts are cast to it. Norms, embeddings, the router and
    projections that are not FP8 keep the dtype they have.

    Args:
        hf_tree: arrays by Hugging Face name, with or without the `model.` prefix; FP8 weights beside their
            `_scale_inv`. Not changed.
        config: the checkpoint's config.
        dtype: dtype of dequantised weights (bfloat16, float32 or float16); None keeps them FP8, as `BlockScaled`.
        partial: allow whole native tensors to be absent.
        donate: delete the JAX arrays of `hf_tree` as they are used; what is handed on as it is stays.

    Returns:
        New arrays by native name: experts as `[experts, hidden, 2*inter]` and `[experts, inter, hidden]`. Tensors that
        need no conversion are the caller's own arrays.

    Raises:
        LayoutError: what is missing, unexpected, or of a wrong shape or dtype.

    Examples:
        >>> mj.synthesize("MiniMax-M2")
        >>> config = mj.MiniMaxConfig.from_pretrained("MiniMax-M2")
        >>> native = mj.from_hf(mj.read_tree("MiniMax-M2"), config)
        >>> experts = native["model.layers.0.mlp.experts.gate_and_up_projs"]
        >>> experts.dtype, experts.shape
        (dtype(bfloat16), (4, 256, 144))
        >>> mj.from_hf(mj.read_tree("MiniMax-M2"), config, dtype=None)["model.layers.0.mlp.experts.down_projs"]
        BlockScaled(float8_e4m3fn[4, 72, 256], scale_inv=float32[4, 1, 2], block=(128, 128))
    """
    raise_if([] if dtype is None else result_problems(dtype), LayoutError)
    tensors = stored_tree(hf_tree)
    checked = survey(describe(tensors), config, layout="hf", partial=partial)
    native = {}
    for entry in checked.entries:
        native[entry.native] = load(entry, tensors, dtype)
        if donate:
            used = [tensors[spec.key] for spec in entry.hf_specs(checked.dtypes[entry.native])]
            _release(used, kept=native[entry.native])
    return native


def to_hf(
    native: Mapping[str, Leaf],
    config: MiniMaxConfig,
    *,
    quantization: bool = False,
    scales: Mapping[str, Array] | None = None,
    exclude_key_regex: str | None = None,
    partial: bool = False,
    donate: bool = False,
) -> dict[str, Array]:
    """Convert a native tree to Hugging Face tensors; the inverse of `from_hf`.

    Args:
        native: leaves by native name; where weights are FP8, a `BlockScaled` or codes beside their `_scale_inv`. Not
            changed.
        config: the checkpoint's config.
        quantization: write block-scaled weights as FP8 with their `_scale_inv`. FP8 weights pass byte for byte; others
            are quantised. Without it, FP8 weights are dequantised to bfloat16.
        scales: source scales by native scale name (see `source_scales`), for weights to be quantised. A weight that
            they reproduce exactly keeps them, so that a weight nobody changed comes back byte for byte; one that
            changed gets scales by amax, and so does one that has none here.
        exclude_key_regex: weights whose Hugging Face names match from their start are left out, as in NeMo AutoModel.
        partial: allow native tensors to be absent.
        donate: delete the JAX arrays of `native` as they are used; what is handed on as it is stays.

    Returns:
        New arrays by Hugging Face name; tensors that need no conversion are the caller's own arrays.

    Raises:
        LayoutError: what is missing, unexpected, or of a wrong shape, dtype or block.
        NumericError: weights to be quantised hold NaN or infinity (under a trace their scales are NaN instead).

    Examples:
        >>> mj.synthesize("MiniMax-M2")
        >>> config, hf = mj.MiniMaxConfig.from_pretrained("MiniMax-M2"), mj.read_tree("MiniMax-M2")
        >>> native, scales = mj.from_hf(hf, config), mj.source_scales(hf, config)
        >>> back = mj.to_hf(native, config, quantization=True, scales=scales)
        >>> all(np.asarray(back[name]).tobytes() == hf[name].tobytes() for name in hf)
        True
    """
    tensors = stored_tree(native)
    checked = survey(describe(tensors), config, layout="native", partial=partial)
    scales = scales or {}
    raise_if([*block_problems(native, checked), *scale_problems(scales, checked.specs.entries)], LayoutError)
    excluded = None if exclude_key_regex is None else re.compile(exclude_key_regex)
    hf: dict[str, Array] = {}
    problems: list[Problem] = []
    for entry in checked.entries:
        leaf = native_leaf(entry, tensors)
        dtype = FP8 if quantization else jnp.bfloat16 if isinstance(leaf, BlockScaled) else None
        emitted = emit_unchecked(entry, leaf, dtype, source=scales.get(entry.native + SCALE_SUFFIX))
        if donate:
            _release(leaf, kept=emitted)
        if excluded:
            emitted = {key: x for key, x in emitted.items() if not excluded.match(key.removesuffix(SCALE_SUFFIX))}
        problems += poisoned(entry, leaf, emitted)
        hf |= emitted
    raise_if(problems, NumericError)
    return hf


def convert_single_tensor_to_hf(
    fqn: str,
    tensor: Leaf,
    config: MiniMaxConfig,
    *,
    exclude_key_regex: str | None = None,
    quantization: bool = False,
    source: Array | None = None,
) -> list[tuple[str, Array]]:
    """Convert one native tensor to the Hugging Face tensors it is made of.

    Args:
        fqn: the tensor's fully qualified native name, with or without the `model.` prefix.
        tensor: the native tensor.
        config: the checkpoint's config.
        exclude_key_regex: as in `to_hf`.
        quantization: as in `to_hf`.
        source: the tensor's grouped source scales, as one leaf of `scales` in `to_hf`.

    Returns:
        Pairs of name and array, expert by expert; FP8 weights have their scales behind them.

    Raises:
        LayoutError: `fqn` is not a native name, or the tensor has a wrong shape, dtype or block.
        NumericError: as in `to_hf`.
    """
    tensors = to_hf(
        {fqn: tensor},
        config,
        quantization=quantization,
        scales=None if source is None else {fqn + SCALE_SUFFIX: source},
        exclude_key_regex=exclude_key_regex,
        partial=True,
    )
    return list(tensors.items())


def source_scales(hf_tree: Mapping[str, Array], config: MiniMaxConfig, *, partial: bool = False) -> dict[str, Array]:
    """The block scales of an FP8 Hugging Face tree by native scale name, grouped as the experts are.

    They are what `to_hf(..., quantization=True, scales=...)` needs to return the source byte for byte: 56 MB for the
    published model.

    Returns:
        float32 arrays, such as `...gate_and_up_projs_scale_inv [experts, hidden/128, 2*inter/128]`; those of weights
        that are not grouped are the caller's own.

    Raises:
        LayoutError: as in `from_hf`.

    Examples:
        >>> mj.synthesize("MiniMax-M2")
        >>> config = mj.MiniMaxConfig.from_pretrained("MiniMax-M2")
        >>> scales = mj.source_scales(mj.read_tree("MiniMax-M2"), config)
        >>> scales["model.layers.0.mlp.experts.gate_and_up_projs_scale_inv"].shape
        (4, 2, 2)
    """
    tensors = stored_tree(hf_tree)
    checked = survey(describe(tensors), config, layout="hf", partial=partial)
    return {
        entry.native + SCALE_SUFFIX: group_scales(entry, tensors)
        for entry in checked.entries
        if checked.dtypes[entry.native] == NAMES[np.dtype(FP8)]
    }


def _release(used: Any, *, kept: Any) -> None:
    """Delete the JAX arrays of `used` that are not among those of `kept`."""
    held = {id(leaf) for leaf in jax.tree.leaves(kept)}
    for leaf in jax.tree.leaves(used):
        if isinstance(leaf, jax.Array) and not isinstance(leaf, jax.core.Tracer) and id(leaf) not in held:
            leaf.delete()


def stored_tree(tree: Mapping[str, Leaf]) -> dict[str, Array]:
    """The arrays of a tree by name, each `BlockScaled` taken apart."""
    tensors: dict[str, Array] = {}
    problems = []
    for key, leaf in tree.items():
        for name, array in stored(key, leaf).items():
            if not hasattr(array, "shape") or not hasattr(array, "dtype"):
                problems.append(Problem(what="not an array", key=name, got=type(array).__name__))
            if name in tensors or (name != key and name in tree):
                problems.append(Problem(what="scales given twice", key=name))
            tensors[name] = array
    raise_if(problems, LayoutError)
    return tensors


@dataclass(frozen=True, kw_only=True, slots=True)
class InMemory:
    """What a check needs to know of an array."""

    dtype: str
    shape: tuple[int, ...]
    file: None = None


def describe(tensors: Mapping[str, Array]) -> dict[str, InMemory]:
    """What a check needs to know of a tree, by name."""
    return {
        key: InMemory(dtype=NAMES.get(array.dtype, str(array.dtype)), shape=tuple(array.shape))
        for key, array in tensors.items()
    }


def block_problems(native: Mapping[str, Leaf], checked: Survey) -> Iterator[Problem]:
    """A grid of scales may have the right shape and yet be that of other blocks, or of other parts."""
    for key, leaf in native.items():
        if isinstance(leaf, BlockScaled):
            expected = native_blocks(checked.specs.by_native[key])
            if (leaf.block, leaf.parts) != expected:
                want, got = (f"block {block}, parts {parts}" for block, parts in (expected, (leaf.block, leaf.parts)))
                yield Problem(what="wrong blocks of scales", key=key, expected=want, got=got)
