"""One look at a piece of one checkpoint or two: digests, unusual numbers, and how the weights compare."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from minimax_jax.jobs.compare import Array, Comparison, Weight, bytes_of, compare, merge
from minimax_jax.jobs.digests import Digest, digest_of
from minimax_jax.jobs.heap import give_back
from minimax_jax.jobs.numbers import Unusual, unusual
from minimax_jax.jobs.source import Source, batches
from minimax_jax.jobs.view import View
from minimax_jax.layout.specs import Entry
from minimax_jax.layout.table import SCALE_SUFFIX
from minimax_jax.ops.workspace import Workspaces

_PIECE_BYTES = 32 * 2**20
"""Most bytes of one checkpoint in one piece of work; with its copies and that of the other it takes five times that."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Look:
    """What was seen in one piece of work.

    Attributes:
        layer: the layer that it belongs to.
        digests: of the stored tensors, for each checkpoint.
        unusual: numbers that a sound checkpoint does not hold, for each checkpoint.
        comparisons: of the weights; none for one checkpoint alone.
        nbytes: bytes that were read.
    """

    layer: int | None
    digests: list[list[Digest]]
    unusual: list[list[Unusual]]
    comparisons: list[Comparison]
    nbytes: int


def pieces(sources: Sequence[Source], entries: Sequence[Entry]) -> Iterator[tuple[Entry, int]]:
    """Every entry, some experts at a time, with the first expert of each piece."""
    for entry in entries:
        yield from batches(entry, _most_bytes(sources, entry), _PIECE_BYTES)


def row_steps(sources: Sequence[Source], entry: Entry) -> Iterator[tuple[int, int]]:
    """The rows of an entry, some at a time: from which to which, of each piece."""
    rows = entry.shape[0]
    step = max(1, _PIECE_BYTES * rows // _most_bytes(sources, entry))
    return ((start, min(start + step, rows)) for start in range(0, rows, step))


def _most_bytes(sources: Sequence[Source], entry: Entry) -> int:
    return max(source.nbytes(entry) for source in sources)


def room_bytes(sources: Sequence[Source], todo: Iterable[tuple[Entry, int]]) -> int:
    """What a thread's workspace holds as it looks at any of these pieces: block-scaled ones as read, and as seen."""
    most = (sum(source.nbytes(entry) for source in sources) for entry, _ in todo if entry.row.scaled)
    return 2 * max(most, default=0)


def look_at(views: Sequence[View], rooms: Workspaces, piece: tuple[Entry, int]) -> Look:
    """Look at a piece through the view of each checkpoint; in this thread's memory, of which nothing is given on."""
    entry, first = piece
    with rooms.mine().holding():
        look = _look_at_blocks(views, entry, first) if entry.row.scaled else _look_at_rows(views, entry)
    give_back(look.nbytes)
    return look


def _look_at_blocks(views: Sequence[View], entry: Entry, first: int) -> Look:
    stored = [view.tensors(entry.native, slice(first, first + entry.experts)) for view in views]
    comparisons = [
        compare(key, *(view.weight(key, tensors) for view, tensors in zip(views, stored, strict=True)))
        for key in itertools.chain(*entry.keys)
        if len(views) == 2
    ]
    return Look(
        layer=entry.layer,
        digests=[[digest_of(key, tensor) for key, tensor in tensors.items()] for tensors in stored],
        unusual=[list(_unusual(tensors)) for tensors in stored],
        comparisons=comparisons,
        nbytes=read_bytes(views, entry),
    )


def _look_at_rows(views: Sequence[View], entry: Entry) -> Look:
    """Looks at some rows at a time."""
    ((key,),) = entry.keys
    hashes = [hashlib.sha256() for _ in views]
    found: list[list[Unusual]] = [[] for _ in views]
    comparisons: list[Comparison] = []
    for chunks in row_chunks(views, entry):
        for digest, numbers, chunk in zip(hashes, found, chunks, strict=True):
            digest.update(bytes_of(chunk).data)
            numbers += unusual(key, chunk, is_scale=False)
        if len(views) == 2:
            comparisons.append(compare(key, *(Weight(values=chunk) for chunk in chunks)))
    digests = [
        [Digest(key=key, dtype=view.source.survey.dtypes[entry.native], shape=entry.shape, sha256=digest.hexdigest())]
        for view, digest in zip(views, hashes, strict=True)
    ]
    return Look(
        layer=entry.layer,
        digests=digests,
        unusual=found,
        comparisons=[merge(comparisons)] if comparisons else [],
        nbytes=read_bytes(views, entry),
    )


def row_chunks(views: Sequence[View], entry: Entry) -> Iterator[list[Array]]:
    """Some rows at a time of an entry that is not block-scaled, through each view: embeddings are large."""
    for start, stop in row_steps([view.source for view in views], entry):
        yield [view.rows(entry, start, stop) for view in views]


def read_bytes(views: Sequence[View], entry: Entry) -> int:
    """Bytes of the stored tensors of an entry in all of the views."""
    return sum(view.source.nbytes(entry) for view in views)


def _unusual(tensors: Mapping[str, Array]) -> Iterator[Unusual]:
    for key, tensor in tensors.items():
        yield from unusual(key, tensor, is_scale=key.endswith(SCALE_SUFFIX))
