"""Taking the figures of every weight: one streaming pass over a checkpoint, or two, in any layouts."""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np

from minimax_jax.jobs.architecture import require_same_architecture
from minimax_jax.jobs.budget import DEFAULT_WORKERS, require_workers
from minimax_jax.jobs.compare import Weight
from minimax_jax.jobs.difference import difference, total
from minimax_jax.jobs.figures import (
    CODES,
    LARGEST_CODES,
    ZERO_CODES,
    Array,
    Blocks,
    code_blocks,
    code_histograms,
    float_blocks,
    float_figures,
    outliers,
    spread,
)
from minimax_jax.jobs.heap import give_back
from minimax_jax.jobs.inspect import inspect
from minimax_jax.jobs.look import pieces, read_bytes, row_chunks
from minimax_jax.jobs.numbers import Unusual, merged, unusual
from minimax_jax.jobs.overview import Counts, Figures, Overview, Scaled
from minimax_jax.jobs.source import Source
from minimax_jax.jobs.view import View
from minimax_jax.layout.specs import Entry
from minimax_jax.layout.table import SCALE_SUFFIX, dissect
from minimax_jax.progress import Progress, Ticker


@dataclass(kw_only=True, slots=True)
class _Found:
    """What was found in one piece of work."""

    nbytes: int
    weights: list[Figures] = field(default_factory=list)
    codes: Counts = field(default_factory=lambda: np.zeros(CODES, np.int64))
    unusual: list[list[Unusual]]
    router_bias: tuple[int, Array] | None = None


def gather(
    first: Source,
    second: Source | None = None,
    *,
    workers: int = DEFAULT_WORKERS,
    progress: Callable[[Progress], None] | None = None,
) -> Overview:
    """Take the figures of every weight. Memory does not grow with the weights: a few hundred bytes are kept of each.

    Args:
        first: an opened checkpoint.
        second: another of the same architecture, to tell what changed from the first to it.
        workers: threads.
        progress: called on the calling thread as the work goes on.

    Raises:
        LayoutError: the two are not of the same architecture.
        RequestError: no workers.
        FormatError: a file changed or ends too early while it is read.
    """
    require_workers(workers)
    sources = (first,) if second is None else (first, second)
    require_same_architecture(sources[0], sources[-1])
    found = list(_measure_all(sources, workers, progress))
    config = first.config
    router_bias = np.full((config.num_hidden_layers, config.num_local_experts), np.nan, np.float32)
    for layer, bias in (each.router_bias for each in found if each.router_bias is not None):
        router_bias[layer] = bias
    return Overview(
        checkpoints=tuple(inspect(source) for source in sources),
        scaled_dtypes=tuple(_scaled_dtypes(source) for source in sources),
        weights=tuple(itertools.chain(*(each.weights for each in found))),
        codes=np.sum([each.codes for each in found], axis=0),
        router_bias=router_bias,
        router_bias_kind=next(dissect(e.keys[0][0]).kind for e in first.survey.entries if _is_router_bias(e)),
        unusual=tuple(merged(itertools.chain(*(each.unusual[n] for each in found))) for n in range(len(sources))),
    )


def _scaled_dtypes(source: Source) -> tuple[str, ...]:
    dtypes = source.survey.dtypes
    return tuple(dict.fromkeys(dtypes[entry.native] for entry in source.survey.entries if entry.row.scaled))


def _measure_all(
    sources: Sequence[Source], workers: int, progress: Callable[[Progress], None] | None
) -> Iterator[_Found]:
    entries = tuple(sources[0].survey.entries)
    ticker = Ticker(sum(source.nbytes(entry) for source in sources for entry in entries), progress)
    with contextlib.ExitStack() as stack:
        views = [View(source, stack.enter_context(source.reader())) for source in sources]
        pool = stack.enter_context(ThreadPoolExecutor(workers, thread_name_prefix="report"))
        stack.callback(pool.shutdown, cancel_futures=True)
        for found in pool.map(functools.partial(_measure, views), pieces(sources, entries)):
            ticker.tick(found.nbytes)
            yield found


def _measure(views: Sequence[View], piece: tuple[Entry, int]) -> _Found:
    entry, first = piece
    found = _Found(nbytes=read_bytes(views, entry), unusual=[[] for _ in views])
    if entry.row.scaled:
        _measure_blocks(found, views, entry, first)
    else:
        _measure_rows(found, views, entry)
    give_back(found.nbytes)
    return found


def _measure_blocks(found: _Found, views: Sequence[View], entry: Entry, first: int) -> None:
    stored = [view.tensors(entry.native, slice(first, first + entry.experts)) for view in views]
    for numbers, tensors in zip(found.unusual, stored, strict=True):
        for key, tensor in tensors.items():
            numbers += unusual(key, tensor, is_scale=key.endswith(SCALE_SUFFIX))
    for expert, keys in enumerate(entry.keys, first):
        for key in keys:
            weights = [view.weight(key, tensors) for view, tensors in zip(views, stored, strict=True)]
            scaled, blocks, codes = _scaled_figures(weights[0])
            found.codes += codes
            found.weights.append(
                Figures(
                    key=key,
                    layer=entry.layer,
                    expert=expert if entry.row.grouped else None,
                    dtype=views[0].source.survey.dtypes[entry.native],
                    shape=entry.part_shape,
                    squares=float(blocks.squares.sum()),
                    amax=float(blocks.amax.max()),
                    scaled=scaled,
                    change=difference(*weights) if len(weights) == 2 else None,
                )
            )


def _scaled_figures(weight: Weight) -> tuple[Scaled, Blocks, Counts]:
    codes = np.zeros(CODES, np.int64)
    if weight.scales is None:
        blocks = float_blocks(weight.values, weight.block)
    else:
        histograms = code_histograms(weight.values, weight.block)
        blocks = code_blocks(histograms, weight.scales)
        codes = histograms.sum((0, 1))
    scaled = Scaled(
        blocks=blocks.amax.size,
        spread=spread(blocks),
        errors=float(blocks.errors.sum()),
        saturated=int(codes[[*LARGEST_CODES]].sum()),
        zeros=int(codes[[*ZERO_CODES]].sum()),
        outliers=tuple(outliers(blocks)),
    )
    return scaled, blocks, codes


def _measure_rows(found: _Found, views: Sequence[View], entry: Entry) -> None:
    ((key,),) = entry.keys
    squares = amax = 0.0
    changes = []
    for chunks in row_chunks(views, entry):
        for numbers, chunk in zip(found.unusual, chunks, strict=True):
            numbers += unusual(key, chunk, is_scale=False)
        of_chunk = float_figures(chunks[0])
        squares, amax = squares + of_chunk[0], max(amax, of_chunk[1])
        if len(chunks) == 2:
            changes.append(difference(*(Weight(values=chunk) for chunk in chunks), part=True))
        if _is_router_bias(entry) and entry.layer is not None:
            found.router_bias = (entry.layer, chunks[0].astype(np.float32))
    found.weights.append(
        Figures(
            key=key,
            layer=entry.layer,
            expert=None,
            dtype=views[0].source.survey.dtypes[entry.native],
            shape=entry.part_shape,
            squares=squares,
            amax=amax,
            change=total(changes) if changes else None,
        )
    )


def _is_router_bias(entry: Entry) -> bool:
    return entry.row.axes == ("expert",)
