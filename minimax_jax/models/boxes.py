"""Boxes: rectangular parts of arrays, as spans of indices along each axis, and where their bytes lie."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import TypeAlias

Span: TypeAlias = tuple[int, int]
"""Indices from the first one up to, not including, the second."""

Box: TypeAlias = tuple[Span, ...]
"""One span for each axis."""


def box_of(index: Sequence[slice], shape: tuple[int, ...]) -> Box:
    """The box of an index as JAX gives for a device's shard: slices of step 1, open ends allowed."""
    return tuple(one.indices(size)[:2] for one, size in zip(index, shape, strict=True))


def whole(shape: tuple[int, ...]) -> Box:
    """The box of all of an array."""
    return tuple((0, size) for size in shape)


def shape_of(box: Box) -> tuple[int, ...]:
    """Shape of the array that a box cuts out."""
    return tuple(stop - start for start, stop in box)


def contains(outer: Box, inner: Box) -> bool:
    """Whether `inner` lies within `outer`."""
    return all(a <= c and d <= b for (a, b), (c, d) in zip(outer, inner, strict=True))


def within(outer: Box, inner: Box) -> tuple[slice, ...]:
    """The index of `inner` in the array that `outer` cuts out."""
    return tuple(slice(start - first, stop - first) for (first, _), (start, stop) in zip(outer, inner, strict=True))


def merge(boxes: Iterable[Box]) -> list[Box]:
    """Fewer and larger boxes that cover the same elements and no others; sorted.

    Neighbours that together are a box become one, axis after axis. Boxes that are no shards of one array may still
    overlap in the result; each box given lies within one of the result.
    """
    merged = sorted(set(boxes))
    for axis in range(len(merged[0]) if merged else 0):
        merged = _merge_along(merged, axis)
    return sorted(merged)


def runs(box: Box, shape: tuple[int, ...]) -> tuple[int, Iterator[int]]:
    """How a box lies in an array in row-major order: contiguous runs of one length.

    Args:
        box: what is wanted.
        shape: of the whole array.

    Returns:
        Elements of a run, and where each run starts, in elements, in the order of the box.
    """
    partial = [axis for axis, (span, size) in enumerate(zip(box, shape, strict=True)) if span != (0, size)]
    axis = partial[-1] if partial else 0
    strides = [math.prod(shape[a + 1 :]) for a in range(len(shape))]
    start = sum(span[0] * stride for span, stride in zip(box[axis:], strides[axis:], strict=True))
    outer = (range(*span) for span in box[:axis])
    starts = (
        start + sum(i * stride for i, stride in zip(at, strides[:axis], strict=True))
        for at in itertools.product(*outer)
    )
    return math.prod(shape_of(box[axis:])), starts


def _merge_along(boxes: list[Box], axis: int) -> list[Box]:
    merged: list[Box] = []
    for box in sorted(boxes, key=lambda box: (_others(box, axis), box[axis])):
        last = merged[-1] if merged else None
        if last is not None and _others(last, axis) == _others(box, axis) and box[axis][0] <= last[axis][1]:
            span = (last[axis][0], max(last[axis][1], box[axis][1]))
            merged[-1] = (*box[:axis], span, *box[axis + 1 :])
        else:
            merged.append(box)
    return merged


def _others(box: Box, axis: int) -> tuple[Box, Box]:
    return box[:axis], box[axis + 1 :]
