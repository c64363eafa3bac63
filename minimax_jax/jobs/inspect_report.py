"""A checkpoint's tree and one of its tensors, to look at and as plain values."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.table import Table
from rich.text import Text
from rich.tree import Tree

from minimax_jax.display import counted, size, table_of

if TYPE_CHECKING:
    from minimax_jax.io.header import TensorInfo
    from minimax_jax.jobs.statistics import Statistics
    from minimax_jax.jobs.tensor import TensorFacts
    from minimax_jax.jobs.tree import Node

_SHOWN = 8
"""Stored tensors that are shown of one that is made of many."""


def tree_document(nodes: Sequence[Node]) -> list[dict[str, Any]]:
    """A tree as plain values."""
    return [
        {
            "name": node.name,
            "alike": node.alike,
            "tensors": node.tensors,
            "bytes": node.nbytes,
            "dtype": node.dtype,
            "shape": None if node.shape is None else list(node.shape),
            "children": tree_document(node.children),
        }
        for node in nodes
    ]


def tree_view(title: str, nodes: Sequence[Node]) -> Tree:
    """A tree to look at."""
    tree = Tree(Text(title))
    _grow(tree, nodes)
    return tree


def _grow(tree: Tree, nodes: Sequence[Node], above: str = "") -> None:
    """Numbers stand behind the step above them, as `layers 0-61 (62 alike)`; so does a step that is alone there."""
    for node in nodes:
        numbered = node.name[0].isdecimal()
        name = f"{above} {node.name}" if numbered else f"{above}.{node.name}" if above else node.name
        numbers_below = node.children and node.children[0].name[0].isdecimal()
        if numbers_below or (len(node.children) == 1 and node.alike == 1):
            _grow(tree, node.children, name)
        else:
            _grow(tree.add(_label(name, node)), node.children)


def _label(name: str, node: Node) -> Text:
    label = Text(name, style="bold" if node.children else "")
    if node.alike > 1:
        label.append(f" ({node.alike} alike)", "not bold cyan")
    what = counted(node.tensors, "tensor") if node.shape is None else f"{node.dtype} {list(node.shape)}"
    return label.append(f"  {what}, {size(node.nbytes)}", "not bold dim")


def tensor_document(facts: TensorFacts) -> dict[str, Any]:
    """One tensor as plain values; figures that are not finite are null."""
    return {
        "path": str(facts.path),
        "name": facts.name,
        "shape": list(facts.shape),
        "axes": list(facts.axes),
        "dtype": facts.dtype,
        "block": list(facts.block),
        "stored": [
            {"key": info.key, "file": str(info.file), "start": info.start, "stop": info.stop, "shape": list(info.shape)}
            for info in facts.stored
        ],
        "statistics": _document(facts.whole),
        "experts": [_document(own) for own in facts.experts],
    }


def _document(seen: Statistics) -> dict[str, Any]:
    return {
        "elements": seen.elements,
        "min": _finite(seen.minimum),
        "max": _finite(seen.maximum),
        "mean": seen.mean,
        "finite": seen.finite,
        "zeros": seen.zeros,
        "nans": seen.nans,
        "saturated": seen.saturated,
        "block_amax": None if not seen.block_amax.size else _amax_document(seen),
        "scale_inv": None if seen.scale_inv is None else [_finite(scale) for scale in seen.scale_inv],
    }


def _amax_document(seen: Statistics) -> dict[str, Any]:
    amax = seen.block_amax
    figures = {"min": amax.min(), "median": np.median(amax), "max": amax.max()}
    return {"blocks": amax.size, **{name: _finite(float(figure)) for name, figure in figures.items()}}


def _finite(figure: float) -> float | None:
    return figure if math.isfinite(figure) else None


def tensor_view(facts: TensorFacts, *, everything: bool = False) -> Iterator[Any]:
    """One tensor to look at, with the first of the stored tensors that hold it or all of them."""
    yield f"{facts.name}: {facts.dtype} {list(facts.shape)} ({', '.join(facts.axes)})"
    yield _places(facts.stored, len(facts.stored) if everything else _SHOWN)
    seen = facts.whole
    table = table_of("", "")
    table.add_row("range", f"{seen.minimum:.6g} to {seen.maximum:.6g}, mean {seen.mean:.6g}")
    if seen.block_amax.size:
        amax = (
            f"{figure:.4g}" for figure in (seen.block_amax.min(), np.median(seen.block_amax), seen.block_amax.max())
        )
        least, median, most = amax
        block = " by ".join(map(str, facts.block))
        table.add_row(
            "amax", f"{least} to {most}, median {median}, of {counted(seen.block_amax.size, 'block')} of {block}"
        )
    if seen.scale_inv is not None:
        table.add_row("scale_inv", " to ".join(f"{scale:.4g}" for scale in seen.scale_inv))
    for name, count in (("zero", seen.zeros), ("saturated", seen.saturated), ("NaN", seen.nans)):
        if count is not None:
            table.add_row(name, f"{count:,} of {seen.elements:,} ({count / seen.elements:.3%})")
    yield table
    if facts.experts:
        yield _experts(facts.experts)


def _places(stored: Sequence[TensorInfo], top: int) -> Table:
    table = table_of("stored as", "file", "bytes")
    for info in stored[:top]:
        table.add_row(Text(info.key), *_place(info))
    if len(stored) > top:
        files = len({info.file for info in stored})
        table.add_row(f"... and {len(stored) - top:,} more", f"{files:,} file{'' if files == 1 else 's'} in all", "")
    return table


def _place(info: TensorInfo) -> tuple[Text, str]:
    """In which file a tensor is, and where; of an array, in whose files its library keeps it."""
    if info.file.name == info.key:
        return Text(f"those of {info.file.parent.name}"), size(info.nbytes)
    name = info.file.name if isinstance(info.file, Path) else str(info.file)
    return Text(name), f"{info.start:,} to {info.stop:,}"


def _experts(experts: Sequence[Statistics]) -> Table:
    fp8 = experts[0].saturated is not None
    table = table_of("expert", "min", "max", "mean", "zero", "NaN", *(("saturated", "scale_inv") if fp8 else ()))
    for number, own in enumerate(experts):
        cells = [f"{own.minimum:.4g}", f"{own.maximum:.4g}", f"{own.mean:.3g}", f"{own.zeros:,}", f"{own.nans:,}"]
        if own.saturated is not None and own.scale_inv is not None:
            cells += [f"{own.saturated:,}", " to ".join(f"{scale:.3g}" for scale in own.scale_inv)]
        table.add_row(str(number), *cells)
    return table
