"""One tensor, by a name of either layout: what it is, where its bytes lie, and what its numbers are like."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from minimax_jax.errors import LayoutError, Problem
from minimax_jax.io.header import TensorInfo
from minimax_jax.io.jsonfile import shown
from minimax_jax.io.location import Location
from minimax_jax.jobs.budget import DEFAULT_WORKERS
from minimax_jax.jobs.compare import Array, Weight
from minimax_jax.jobs.heap import give_back
from minimax_jax.jobs.look import pieces, row_steps
from minimax_jax.jobs.source import Source, by_ranges
from minimax_jax.jobs.statistics import Statistics, merged, statistics
from minimax_jax.jobs.view import View
from minimax_jax.layout.near import near_names
from minimax_jax.layout.specs import Entry
from minimax_jax.layout.table import SCALE_SUFFIX
from minimax_jax.progress import Progress, Ticker


@dataclass(frozen=True, kw_only=True)
class TensorFacts:
    """What `describe` found.

    Attributes:
        path: the checkpoint.
        name: the tensor's, of either layout.
        shape: its shape, in the layout that the name is of.
        dtype: as it is stored, in safetensors' spelling.
        axes: logical names of its axes.
        block: rows and columns of the blocks that `block_amax` speaks of, as Hugging Face stores a matrix.
        stored: the stored tensors that hold it, scales included: one or two, or those of many experts.
        whole: its numbers.
        experts: those of each expert, where it holds several.
    """

    path: Location
    name: str
    shape: tuple[int, ...]
    dtype: str
    axes: tuple[str, ...]
    block: tuple[int, int]
    stored: tuple[TensorInfo, ...]
    whole: Statistics
    experts: tuple[Statistics, ...]


@dataclass(frozen=True, kw_only=True)
class _Asked:
    """What a name speaks of: experts of an entry, all parts of them or one, the weights or their scales."""

    entry: Entry
    first: int
    part: int | None
    scales: bool

    @property
    def native(self) -> bool:
        """Whether it is all of a native tensor, as such."""
        return self.part is None

    @property
    def parts(self) -> slice:
        return slice(None) if self.part is None else slice(self.part, self.part + 1)


def describe(
    source: Source, name: str, *, workers: int = DEFAULT_WORKERS, progress: Callable[[Progress], None] | None = None
) -> TensorFacts:
    """Look at one tensor. Of a remote checkpoint, the bytes of this tensor alone are fetched.

    Args:
        source: an opened checkpoint.
        name: a name of either layout, whichever the checkpoint has: a weight, or its block scales.
        workers: threads.
        progress: called on the calling thread as the work goes on.

    Raises:
        LayoutError: there is no such tensor; the message says what may be meant.
        FormatError: a file changed or ends too early while it is read.
    """
    asked = _find(source, name)
    entry = asked.entry
    shape = (entry.grid if asked.scales else entry.shape) if asked.native else _part_shape(asked)
    found = list(_by_expert(by_ranges(source), asked, workers, progress))
    return TensorFacts(
        path=source.path,
        name=name,
        shape=shape,
        dtype="F32" if asked.scales else source.survey.dtypes[entry.native],
        axes=entry.row.native_axes if asked.native else entry.row.axes,
        block=source.config.block,
        stored=tuple(_stored(source, asked)),
        whole=merged(found),
        experts=tuple(found) if asked.native and entry.row.grouped else (),
    )


def _part_shape(asked: _Asked) -> tuple[int, ...]:
    return asked.entry.part_grid if asked.scales else asked.entry.part_shape


def _find(source: Source, name: str) -> _Asked:
    table = source.survey.specs
    scales = name.endswith(SCALE_SUFFIX)
    weight = name.removesuffix(SCALE_SUFFIX)
    place, entry = table.places.get(weight), table.by_native.get(weight)
    if entry is None and place is not None:
        asked = _Asked(
            entry=place.entry.narrow(slice(place.expert, place.expert + 1)),
            first=place.expert,
            part=place.part,
            scales=scales,
        )
    elif entry is not None:
        asked = _Asked(entry=entry, first=0, part=None, scales=scales)
    else:
        raise LayoutError(_unknown(source, name))
    if scales and not (asked.entry.row.scaled and _has_scales(source, asked)):
        got = source.survey.dtypes[asked.entry.native]
        raise LayoutError(Problem(what="no block scales", file=str(source.path), key=name, got=f"a weight in {got}"))
    return asked


def _has_scales(source: Source, asked: _Asked) -> bool:
    return source.survey.dtypes[asked.entry.native] == "F8_E4M3" or _beside(source, asked) is not None


def _beside(source: Source, asked: _Asked) -> TensorInfo | None:
    """The scales in the sidecar of a native float checkpoint; under native names alone."""
    return source.sidecar.get(asked.entry.native + SCALE_SUFFIX) if asked.native else None


def _unknown(source: Source, name: str) -> Problem:
    table = source.survey.specs
    near = near_names(name, itertools.chain(source.readable.tensors, table.places, table.by_native))
    remedy = f"did you mean {' or '.join(near)}?" if near else "inspect --tree shows the names"
    return Problem(what="no such tensor", file=str(source.path), key=shown(name), remedy=remedy)


def _stored(source: Source, asked: _Asked) -> Iterator[TensorInfo]:
    beside = _beside(source, asked)
    if asked.scales and beside is not None:
        yield beside
        return
    wanted = {key for keys in asked.entry.keys for key in keys[asked.parts]}
    for spec in source.specs(asked.entry):
        is_scale = spec.key.endswith(SCALE_SUFFIX)
        weight = spec.key.removesuffix(SCALE_SUFFIX)
        if (is_scale or not asked.scales) and (weight in wanted or source.survey.layout == "native"):
            yield source.checkpoint.tensors[spec.key]


def _by_expert(
    source: Source, asked: _Asked, workers: int, progress: Callable[[Progress], None] | None
) -> Iterator[Statistics]:
    """Statistics of each expert in turn; of one tensor that is no expert's, of some rows at a time."""
    ticker = Ticker(source.nbytes(asked.entry), progress)
    with source.reader() as reader, ThreadPoolExecutor(workers, thread_name_prefix="inspect") as pool:
        view = View(source, reader)
        beside = _beside(source, asked)
        if asked.scales and beside is not None:
            yield from (statistics(Weight(values=own.reshape(-1))) for own in _each(asked.entry, reader.read(beside)))
        elif not asked.entry.row.scaled:
            yield merged(pool.map(functools.partial(_of_rows, view, asked.entry), _whole_blocks(source, asked.entry)))
        else:
            for found, nbytes in pool.map(functools.partial(_of_experts, view, asked), pieces([source], [asked.entry])):
                ticker.tick(nbytes)
                yield from found


def _of_rows(view: View, entry: Entry, rows: tuple[int, int]) -> Statistics:
    return statistics(Weight(values=view.rows(entry, *rows), block=view.source.config.block))


def _each(entry: Entry, array: Array) -> Iterator[Array]:
    """The experts of a native array, or all of one that does not group."""
    return iter(array if entry.row.grouped else [array])


def _whole_blocks(source: Source, entry: Entry) -> Iterator[tuple[int, int]]:
    """The rows of an entry, some at a time, none of which cuts a block."""
    side = source.config.block[0]
    starts = sorted({start - start % side for start, _ in row_steps([source], entry)})
    return itertools.pairwise([*starts, entry.shape[0]])


def _of_experts(view: View, asked: _Asked, piece: tuple[Entry, int]) -> tuple[list[Statistics], int]:
    entry, first = piece
    first += asked.first
    tensors = view.tensors(entry.native, slice(first, first + entry.experts))
    found = [merged(_of_part(view, asked, key, tensors) for key in keys[asked.parts]) for keys in entry.keys]
    nbytes = view.source.nbytes(entry)
    give_back(nbytes)
    return found, nbytes


def _of_part(view: View, asked: _Asked, key: str, tensors: Mapping[str, Array]) -> Statistics:
    """Statistics of one stored matrix, or of its block scales: those have no blocks of their own."""
    if asked.scales:
        return statistics(Weight(values=tensors[key + SCALE_SUFFIX].reshape(-1)))
    return statistics(view.weight(key, tensors))
