"""What a process reads to fill its shards, decided from headers alone: byte ranges, in units of bounded memory."""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass

from minimax_jax.errors import JobError, raise_if
from minimax_jax.jobs.budget import FOR_A_CALL, LEAST_UNIT_BYTES, over_budget, require_workers, share_bytes
from minimax_jax.models.boxes import Box, Span, merge, shape_of
from minimax_jax.models.pieces import Goal, Piece, Want

_UNIT_BYTES = 256 * 2**20
"""Most memory of one unit where it can be split; larger units are no faster."""

_COPIES_OF_INPUT, _COPIES_OF_OUTPUT = 2, 3
"""What a unit holds in host memory: what it read and a copy for the devices; its output and two temporaries like it,
which only a CPU device has there."""


@dataclass(frozen=True, kw_only=True)
class Portion:
    """Part of a shard: a span of its leading axis.

    Attributes:
        shard: the box of the whole shard.
        span: what of it, along the leading axis of the whole array.
        pieces: what it is made of.
    """

    shard: Box
    span: Span
    pieces: tuple[Piece, ...]

    @property
    def start(self) -> int:
        """Where it begins in the shard, along the leading axis."""
        return self.span[0] - self.shard[0][0]

    @property
    def is_whole(self) -> bool:
        """Whether it is all of the shard."""
        return self.span == self.shard[0]


@dataclass(frozen=True, kw_only=True)
class Unit:
    """Work on one array: what is read once, and the portions of shards that it feeds.

    Attributes:
        goal: the array.
        portions: parts of its shards, all over one span of the leading axis.
        reads: byte ranges, merged over the shards.
        memory_bytes: peak host memory, the finished shards apart.
    """

    goal: Goal
    portions: tuple[Portion, ...]
    reads: tuple[Want, ...]
    memory_bytes: int

    @property
    def read_bytes(self) -> int:
        """Bytes that are read."""
        return sum(want.nbytes for want in self.reads)


def plan_units(shards: Mapping[Goal, Collection[Box]], *, unit_bytes: int = _UNIT_BYTES) -> tuple[Unit, ...]:
    """Plan the reading of some shards: a pure function of the source's headers and the shards' boxes.

    Args:
        shards: for each array the boxes that are wanted of it: of the shards of one process, or any others. Boxes
            given twice count once.
        unit_bytes: most memory of one unit; one expert (or row) is a unit even if it takes more.

    Returns:
        Units in an order that feeds different shards in turn. They do not depend on each other.
    """
    return tuple(unit for goal, boxes in shards.items() for unit in _units(goal, sorted(set(boxes)), unit_bytes))


def unit_bytes_of(max_memory_bytes: int, workers: int) -> int:
    """Most memory that one unit may take, of a budget for all that run at a time.

    Raises:
        RequestError: no workers.
    """
    require_workers(workers)
    return max(LEAST_UNIT_BYTES, min(share_bytes(max_memory_bytes, workers), _UNIT_BYTES))


def require_budget(units: Iterable[Unit], max_memory_bytes: int, workers: int) -> None:
    """Raise a JobError where the largest unit does not fit the budget; it says what is needed."""
    largest = max((unit.memory_bytes for unit in units), default=0)
    raise_if(over_budget(largest, max_memory_bytes, workers, remedy=FOR_A_CALL), JobError)


def _units(goal: Goal, boxes: list[Box], unit_bytes: int) -> Iterator[Unit]:
    spans = [_batches(goal, lead, list(own), unit_bytes) for lead, own in itertools.groupby(boxes, lambda box: box[0])]
    for turn in itertools.zip_longest(*spans):
        yield from (_unit(goal, span, own) for span, own in filter(None, turn))


def _batches(goal: Goal, lead: Span, boxes: list[Box], unit_bytes: int) -> list[tuple[Span, list[Box]]]:
    """The span of a shard's leading axis in batches that fit the memory; matrices in whole blocks where they can be."""
    length = lead[1] - lead[0]
    at_once = max(1, unit_bytes * length // max(_unit(goal, lead, boxes).memory_bytes, 1))
    if goal.dequantised and len(goal.shape) == 2 and at_once > goal.block[0]:
        at_once -= at_once % goal.block[0]
    starts = range(lead[0], lead[1], min(at_once, length))
    return [((start, min(start + at_once, lead[1])), boxes) for start in starts]


def _unit(goal: Goal, span: Span, boxes: list[Box]) -> Unit:
    portions = tuple(Portion(shard=box, span=span, pieces=goal.pieces((span, *box[1:]))) for box in boxes)
    reads = tuple(_merged(want for portion in portions for piece in portion.pieces for want in piece.wants))
    made = sum(math.prod(shape_of((span, *box[1:]))) for box in boxes) * goal.dtype.itemsize
    memory = _COPIES_OF_INPUT * sum(want.nbytes for want in reads) + _COPIES_OF_OUTPUT * made
    return Unit(goal=goal, portions=portions, reads=reads, memory_bytes=memory)


def _merged(wants: Iterable[Want]) -> Iterator[Want]:
    """The same bytes in as few boxes as can be, and each once."""
    boxes: dict[str, tuple[Want, list[Box]]] = {}
    for want in wants:
        boxes.setdefault(want.infos[0].key, (want, []))[1].append(want.box)
    for first, own in boxes.values():
        yield from (Want(infos=first.infos, box=box) for box in merge(own))
