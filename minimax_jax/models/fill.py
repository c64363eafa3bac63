"""Fills shards on their devices: bytes cross as they are stored, and are dequantised and grouped there.

Every device runs programs of its own, without a collective: no process waits for another. Until a shard is whole its
bits are handled, not its numbers: a compiler may move bfloat16 or FP8 about by way of wider floats.
"""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
from jax import lax

from minimax_jax.errors import CheckpointError
from minimax_jax.io.header import TensorInfo
from minimax_jax.io.reader import Reader
from minimax_jax.models.boxes import Box, contains, runs, shape_of, within
from minimax_jax.models.load_plan import Portion, Unit
from minimax_jax.models.pieces import Goal, Home, Want
from minimax_jax.ops.assemble import encode
from minimax_jax.ops.checks import Block
from minimax_jax.ops.experts import group
from minimax_jax.ops.fp8 import dequantize
from minimax_jax.ops.grouped import put_grouped
from minimax_jax.ops.rounding import bits_of
from minimax_jax.ops.scaled import BlockScaled, dequantize_grouped

HostArray: TypeAlias = npt.NDArray[Any]
Devices: TypeAlias = Mapping[tuple[Home, Box], Sequence[jax.Device]]

_Pieces: TypeAlias = Sequence[tuple[Any, ...]]
"""Values, with their scales behind them where they are to be dequantised."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How pieces become a portion of a shard.

    Attributes:
        dtype: what the values become.
        grouped: whether they are matrices of experts, to be grouped.
        block: of FP8 blocks, as the pieces are stored.
        offsets: of each piece in its first block.
        alike: whether all pieces are of one shape.
    """

    dtype: np.dtype[Any]
    grouped: bool
    block: Block
    offsets: tuple[tuple[int, int], ...]
    alike: bool


class Filler:
    """Executes units; safe to call from several threads."""

    def __init__(self, reader: Reader, devices: Devices):
        """Fill with what `reader` reads; `devices` are those that hold a box of an array."""
        self._reader = reader
        self._devices = devices
        self._shards: dict[tuple[Home, Box, jax.Device], jax.Array] = {}
        self._locks: defaultdict[tuple[Home, Box], threading.Lock] = defaultdict(threading.Lock)

    def do(self, unit: Unit) -> None:
        """Read and place one unit; its host memory is free when this returns.

        Raises:
            FormatError: the source changed or ends too early while it is read; names the file, the key and the array.
        """
        goal = unit.goal
        held = [(want, _read(self._reader, goal, want)) for want in unit.reads]
        for portion in unit.portions:
            pieces = [tuple(_view(held, want) for want in piece.wants) for piece in portion.pieces]
            recipe = _recipe(goal, portion)
            devices = self._devices[goal.home, portion.shard]
            with self._locks[goal.home, portion.shard]:
                for shard in [self._place(goal, portion, pieces, recipe, device) for device in devices]:
                    shard.block_until_ready()

    def finished(self, home: Home, box: Box, device: jax.Device, dtype: np.dtype[Any]) -> jax.Array:
        """A shard that all of its units have filled, as numbers of `dtype`; handed over."""
        shard = self._shards.pop((home, box, device))
        return shard if shard.dtype == dtype else _numbers(shard, dtype)

    def _place(self, goal: Goal, portion: Portion, pieces: _Pieces, recipe: Recipe, device: jax.Device) -> jax.Array:
        key = (goal.home, portion.shard, device)
        shard: jax.Array
        on_device = jax.device_put(pieces if recipe.grouped else [_only(piece) for piece in pieces], device)
        if goal.layers or not portion.is_whole:
            begun = self._shards.pop(key) if key in self._shards else _empty(goal, portion.shard, device)
            start = tuple(map(np.int32, (*goal.layer, portion.start)))
            shard = put(begun, on_device, start, recipe)
        elif recipe.grouped or on_device[0][0].dtype != goal.dtype:
            shard = make(on_device, recipe)
        else:
            shard = on_device[0][0]
        self._shards[key] = shard
        return shard


def _empty(goal: Goal, box: Box, device: jax.Device) -> jax.Array:
    return jnp.zeros((*goal.layers, *shape_of(box)), f"u{goal.dtype.itemsize}", device=device)


def _read(reader: Reader, goal: Goal, want: Want) -> HostArray:
    """What is wanted, [tensors, *box]; a fresh array, since JAX may go on using it."""
    array = np.empty(want.shape, want.dtype)
    for own, info in zip(array, want.infos, strict=True):
        try:
            _read_box(reader, info, want.box, own)
        except CheckpointError as error:
            box = ", ".join(f"{start}:{stop}" for start, stop in want.box)
            what = f", for a shard of the {goal.role} of {goal.name}: [{box}] of what is stored"
            problems = [replace(one, what=one.what + what, key=one.key or info.key) for one in error.problems]
            raise type(error)(problems) from error
    return array


def _read_box(reader: Reader, info: TensorInfo, box: Box, out: HostArray) -> None:
    """Fill `out` with a box of a tensor: one read for each contiguous run, and no byte more."""
    elements, starts = runs(box, info.shape)
    nbytes, itemsize = elements * out.dtype.itemsize, out.dtype.itemsize
    data = out.reshape(-1).view(np.uint8)
    for number, start in enumerate(starts):
        reader.read_into(info.file, info.start + start * itemsize, data[number * nbytes : (number + 1) * nbytes])


def _view(held: Sequence[tuple[Want, HostArray]], want: Want) -> HostArray:
    """What is wanted, in what was read; a view."""
    read, array = next(one for one in held if one[0].infos == want.infos and contains(one[0].box, want.box))
    return array[(slice(None), *within(read.box, want.box))]


def _only(piece: tuple[HostArray, ...]) -> tuple[HostArray, ...]:
    """A piece of one tensor, without the axis of tensors."""
    return tuple(array[0] for array in piece)


def _recipe(goal: Goal, portion: Portion) -> Recipe:
    return Recipe(
        dtype=goal.dtype,
        grouped=goal.grouped,
        block=goal.block,
        offsets=tuple(piece.offset for piece in portion.pieces),
        alike=len({piece.values.shape for piece in portion.pieces}) == 1,
    )


def _combine(pieces: _Pieces, recipe: Recipe) -> jax.Array:
    """The bits of one portion of a shard."""
    dequantised = len(pieces[0]) == 2
    if parts := _matrices(pieces, recipe):
        return bits_of(dequantize_grouped(parts, recipe.dtype))
    each = zip(pieces, recipe.offsets, strict=True)
    made = [_weights(piece, recipe, offset) if dequantised else _cast(piece[0], recipe) for piece, offset in each]
    return group(made) if recipe.grouped else jnp.concatenate(made, axis=-1)


def _matrices(pieces: _Pieces, recipe: Recipe) -> list[BlockScaled]:
    """The pieces, where they are whole blocks of FP8 matrices that go side by side; else nothing."""
    if len(pieces[0]) != 2 or not recipe.grouped or not recipe.alike or any(map(any, recipe.offsets)):
        return []
    return [BlockScaled(values=values, scale_inv=scales, block=recipe.block) for values, scales in pieces]


def _weights(piece: tuple[jax.Array, ...], recipe: Recipe, offset: tuple[int, int]) -> jax.Array:
    values, scales = piece
    return bits_of(dequantize(values, scales, recipe.dtype, block=recipe.block, offset=offset))


def _cast(values: jax.Array, recipe: Recipe) -> jax.Array:
    if values.dtype == recipe.dtype:
        return bits_of(values)
    return bits_of(jnp.asarray(encode(values, recipe.dtype, block=recipe.block)))


@partial(jax.jit, static_argnames="recipe")
def make(pieces: _Pieces, recipe: Recipe) -> jax.Array:
    """A shard of one portion."""
    return lax.bitcast_convert_type(_combine(pieces, recipe), recipe.dtype)


@partial(jax.jit, static_argnames="recipe", donate_argnames="shard")
def put(shard: jax.Array, pieces: _Pieces, start: tuple[np.int32, ...], recipe: Recipe) -> jax.Array:
    """The bits of a shard with one portion of it filled in, in place; `start` is where, along the leading axes."""
    parts = _matrices(pieces, recipe)
    if parts and len(start) == shard.ndim - 2:
        return put_grouped(shard, parts, start, recipe.dtype)
    portion = _combine(pieces, recipe)
    portion = portion.reshape(*(1 for _ in range(shard.ndim - portion.ndim)), *portion.shape)
    rest = (np.int32(0) for _ in range(shard.ndim - len(start)))
    return lax.dynamic_update_slice(shard, portion, (*start, *rest))


@partial(jax.jit, static_argnames="dtype", donate_argnames="bits")
def _numbers(bits: jax.Array, dtype: np.dtype[Any]) -> jax.Array:
    return lax.bitcast_convert_type(bits, dtype)
