"""What a box of a native array is made of: which boxes of which stored tensors, and of which block scales."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np

from minimax_jax.dtypes import DTYPES
from minimax_jax.io.header import TensorInfo
from minimax_jax.jobs.source import Source
from minimax_jax.layout.specs import Entry, specs
from minimax_jax.layout.table import SCALE_SUFFIX
from minimax_jax.leaves import native_blocks
from minimax_jax.models.boxes import Box, Span, shape_of
from minimax_jax.models.stack import stacked_entries
from minimax_jax.ops.checks import Block

Role = Literal["weights", "codes", "scales"]
"""What an array is: a whole leaf, or one of the two arrays of a `BlockScaled`."""


@dataclass(frozen=True, kw_only=True)
class Want:
    """The same box of some stored tensors of one shape and dtype."""

    infos: tuple[TensorInfo, ...]
    box: Box

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of what is read: [tensors, *box]."""
        return (len(self.infos), *shape_of(self.box))

    @property
    def dtype(self) -> np.dtype[Any]:
        """Dtype of what is read."""
        return self.infos[0].np_dtype

    @property
    def nbytes(self) -> int:
        """Bytes of what is read."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True, kw_only=True)
class Piece:
    """Values, and the block scales that cover them if they are to be dequantised.

    Attributes:
        values: what is wanted of the tensors of values.
        scales: what is wanted of the tensors of scales: every block that the values touch.
        offset: row and column of the first value within the first of those blocks.
    """

    values: Want
    scales: Want | None = None
    offset: tuple[int, int] = (0, 0)

    @property
    def wants(self) -> tuple[Want, ...]:
        """All that is read for this piece."""
        return (self.values,) if self.scales is None else (self.values, self.scales)


class Home(NamedTuple):
    """An array of the tree that is made: its leaf's name, and what it is."""

    name: str
    role: Role


@dataclass(frozen=True, kw_only=True, eq=False)
class Goal:
    """One native array to be loaded, or one layer of a stacked one.

    Attributes:
        name: the name of its leaf in the tree that is made.
        entry: the entry of the source's layout that it comes from.
        role: what the array is.
        dtype: what it becomes.
        source: the checkpoint.
        layer: where it goes in a stacked array, by an index for each axis in `layers`.
        layers: the axes that a stacked array has in front.
    """

    name: str
    entry: Entry
    role: Role
    dtype: np.dtype[Any]
    source: Source
    layer: tuple[int, ...] = ()
    layers: tuple[int, ...] = ()

    @property
    def home(self) -> Home:
        """Which array it becomes, or a layer of."""
        return Home(self.name, self.role)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of all of it, layers that are stacked apart."""
        return self.entry.grid if self.role == "scales" else self.entry.shape

    @property
    def grouped(self) -> bool:
        """Whether it is put together from the matrices of experts, each a tensor of its own."""
        return self.entry.row.grouped and self.source.survey.layout == "hf"

    @property
    def dequantised(self) -> bool:
        """Whether it is stored as FP8 and becomes weights."""
        return self.role == "weights" and self.source.survey.dtypes[self.entry.native] == "F8_E4M3"

    @property
    def block(self) -> Block:
        """Rows and columns of one FP8 block, as the values are stored."""
        return self.entry.block if self.grouped else native_blocks(self.entry)[0]

    def pieces(self, box: Box) -> tuple[Piece, ...]:
        """What a box of the array is made of, side by side along its last axis.

        Matrices of experts come as [experts, rows, cols] and are to be grouped; all else as the array has it, with one
        axis of size 1 in front.
        """
        return tuple(self._of_experts(box) if self.grouped else self._of_one(box))

    def _of_experts(self, box: Box) -> Iterator[Piece]:
        experts, cols, across = box
        rows = self.entry.part_grid[0] if self.role == "scales" else self.entry.part_shape[0]
        for part, span in _cut(across, rows):
            keys = [own[part] for own in self.entry.keys[slice(*experts)]]
            values = Want(infos=self._infos(keys, scales=self.role == "scales"), box=(span, cols))
            yield self._with_scales(values, keys, (_blocks(span, self.block[0]), _blocks(cols, self.block[1])))

    def _of_one(self, box: Box) -> Iterator[Piece]:
        keys = [self.entry.native if self.source.survey.layout == "native" else self.entry.keys[0][0]]
        infos = self._infos(keys, scales=self.role == "scales")
        if not self.dequantised:
            yield Piece(values=Want(infos=infos, box=box))
            return
        *lead, rows, across = box
        size = self.shape[-1] // native_blocks(self.entry)[1]
        for part, span in _cut(across, size):
            values = Want(infos=infos, box=(*lead, rows, (part * size + span[0], part * size + span[1])))
            first = part * -(-size // self.block[1])
            start, stop = _blocks(span, self.block[1])
            grid = (*lead, _blocks(rows, self.block[0]), (first + start, first + stop))
            piece = self._with_scales(values, keys, grid)
            yield dataclasses.replace(piece, offset=(piece.offset[0], span[0] % self.block[1]))

    def _with_scales(self, values: Want, keys: list[str], grid: Box) -> Piece:
        if not self.dequantised:
            return Piece(values=values)
        (row, _), (col, _) = values.box[-2:]
        scales = Want(infos=self._infos(keys, scales=True), box=grid)
        return Piece(values=values, scales=scales, offset=(row % self.block[0], col % self.block[1]))

    def _infos(self, keys: list[str], *, scales: bool) -> tuple[TensorInfo, ...]:
        tensors = self.source.checkpoint.tensors
        return tuple(tensors[key + SCALE_SUFFIX if scales else key] for key in keys)


def goals(source: Source, dtype: np.dtype[Any] | None, *, stacked: bool = False) -> Iterator[Goal]:
    """Every array of a native tree: one for each leaf, or the codes and the scales of what stays FP8.

    Names are those of a native tree, though some exports leave their prefix out.

    Args:
        source: the checkpoint.
        dtype: what FP8 weights are dequantised to, and grouped experts cast to; None keeps what is there. Other
            tensors keep what they have, as in `from_hf`.
        stacked: whether the layers are stacked, as by `stack_layers`: then one goal for each layer.
    """
    config = source.config
    stacks = {one.native: name for name, group in stacked_entries(config).items() for one in group}
    for named, entry in zip(specs(config).entries, source.survey.specs.entries, strict=True):
        for role, own in _roles(entry, DTYPES[source.survey.dtypes[entry.native]], dtype):
            goal = Goal(name=named.native, entry=entry, role=role, dtype=own, source=source)
            if stacked:
                goal = dataclasses.replace(goal, name=stacks[named.native])
            if stacked and entry.layer is not None:
                goal = dataclasses.replace(goal, layer=(entry.layer,), layers=(config.num_hidden_layers,))
            yield goal


def _roles(entry: Entry, stored: np.dtype[Any], dtype: np.dtype[Any] | None) -> Iterator[tuple[Role, np.dtype[Any]]]:
    quantised = stored == DTYPES["F8_E4M3"]
    if quantised and dtype is None:
        yield from (("codes", stored), ("scales", DTYPES["F32"]))
    else:
        yield "weights", dtype if dtype is not None and (quantised or entry.row.grouped) else stored


def _cut(span: Span, size: int) -> Iterator[tuple[int, Span]]:
    """A span over equal parts laid end to end: which parts it touches, and the span within each."""
    for part in range(span[0] // size, -(-span[1] // size)):
        yield part, (max(span[0] - part * size, 0), min(span[1] - part * size, size))


def _blocks(span: Span, block: int) -> Span:
    """The blocks that a span touches."""
    return span[0] // block, -(-span[1] // block)
