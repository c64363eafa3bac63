"""What differs between two checkpoints, in any two layouts, and by how much: streaming, ranked by difference."""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, get_args

from minimax_jax.display import Displayed
from minimax_jax.errors import Problem, RequestError
from minimax_jax.io.location import Location
from minimax_jax.jobs.architecture import require_same_architecture
from minimax_jax.jobs.budget import DEFAULT_WORKERS, require_workers
from minimax_jax.jobs.compare import Weight
from minimax_jax.jobs.difference import Difference, difference, total
from minimax_jax.jobs.heap import give_back
from minimax_jax.jobs.look import pieces, row_steps
from minimax_jax.jobs.sample import Sample, draw
from minimax_jax.jobs.source import Source
from minimax_jax.jobs.view import View
from minimax_jax.layout.check import Layout
from minimax_jax.layout.specs import Entry
from minimax_jax.progress import Progress, Ticker

_SHOWN = 20

Rank: TypeAlias = Literal["relative", "ulp", "cosine", "abs"]


@dataclass(frozen=True, kw_only=True, slots=True)
class WeightDiff:
    """One weight in two checkpoints.

    Attributes:
        key: its Hugging Face name.
        dtypes: stored dtype in the first and in the second.
        figures: how far they are apart.
    """

    key: str
    dtypes: tuple[str, str]
    figures: Difference


@dataclass(frozen=True, kw_only=True, repr=False)
class Diff(Displayed):
    """What `diff` saw.

    Attributes:
        paths: the two checkpoints.
        layouts: whose names they have.
        rank: what the differences are ranked by.
        sample: which part was looked at; None for all of it.
        weights: how many weights were compared.
        elements: how many elements they have.
        differing: how many of these differ.
        differences: those that differ, the largest difference first.
    """

    paths: tuple[Location, Location]
    layouts: tuple[Layout, Layout]
    rank: Rank
    sample: Sample | None
    weights: int
    elements: int
    differing: int
    differences: tuple[WeightDiff, ...]

    @property
    def same(self) -> bool:
        """Whether nothing differs in value."""
        return not self.differences

    def views(self) -> Iterable[Any]:
        """What there is to look at."""
        from minimax_jax.jobs.diff_report import view

        return view(self, top=_SHOWN)


def diff(
    first: Source,
    second: Source,
    *,
    rank: Rank = "relative",
    sample: str | None = None,
    workers: int = DEFAULT_WORKERS,
    progress: Callable[[Progress], None] | None = None,
) -> Diff:
    """Compare two checkpoints by value, weight by weight. Memory does not grow with the checkpoint.

    Args:
        first: an opened checkpoint.
        second: another of the same architecture.
        rank: which difference comes first: the largest `relative` one, that of most units of the last place (`ulp`), of
            the smallest `cosine`, or of the largest absolute difference (`abs`). Weights in which a NaN or an infinity
            stands against something else come before all others.
        sample: look at a part only; as in `jobs.verify.verify`.
        workers: threads.
        progress: called on the calling thread as the work goes on.

    Raises:
        LayoutError: the two are not of the same architecture.
        RequestError: no such `rank` or `sample`, or no workers.
        FormatError: a file changed or ends too early while it is read.
    """
    if rank not in get_args(Rank):
        raise RequestError(Problem(what="no such rank", expected=" or ".join(get_args(Rank)), got=str(rank)))
    require_workers(workers)
    require_same_architecture(first, second)
    entries = tuple(first.survey.entries)
    taken, chosen = (None, entries) if sample is None else draw(entries, sample)
    seen = _by_weight((first, second), chosen, workers, progress)
    places = first.survey.specs.places
    dtypes = {
        key: (first.survey.dtypes[places[key].entry.native], second.survey.dtypes[places[key].entry.native])
        for key in seen
    }
    found = [WeightDiff(key=key, dtypes=dtypes[key], figures=own) for key, own in seen.items() if own.differing]
    return Diff(
        paths=(first.path, second.path),
        layouts=(first.survey.layout, second.survey.layout),
        rank=rank,
        sample=taken,
        weights=len(seen),
        elements=sum(own.elements for own in seen.values()),
        differing=sum(own.differing for own in seen.values()),
        differences=tuple(sorted(found, key=_ORDER[rank])),
    )


_ORDER: Mapping[Rank, Callable[[WeightDiff], tuple[float, float]]] = {
    "relative": lambda weight: (-weight.figures.non_finite, -weight.figures.relative),
    "ulp": lambda weight: (-weight.figures.non_finite, -weight.figures.max_ulp),
    "cosine": lambda weight: (-weight.figures.non_finite, weight.figures.cosine),
    "abs": lambda weight: (-weight.figures.non_finite, -weight.figures.max_abs),
}


def _by_weight(
    sources: Sequence[Source], entries: Sequence[Entry], workers: int, progress: Callable[[Progress], None] | None
) -> dict[str, Difference]:
    ticker = Ticker(sum(source.nbytes(entry) for source in sources for entry in entries), progress)
    seen: dict[str, Difference] = {}
    with contextlib.ExitStack() as stack:
        views = [View(source, stack.enter_context(source.reader())) for source in sources]
        pool = stack.enter_context(ThreadPoolExecutor(workers, thread_name_prefix="diff"))
        stack.callback(pool.shutdown, cancel_futures=True)
        for found, nbytes in pool.map(functools.partial(_look_at, views), pieces(sources, entries)):
            seen |= found
            ticker.tick(nbytes)
    return seen


def _look_at(views: Sequence[View], piece: tuple[Entry, int]) -> tuple[dict[str, Difference], int]:
    """The weights of a piece, and the bytes that were read for it."""
    entry, first = piece
    found = dict(_in_blocks(views, entry, first) if entry.row.scaled else _in_rows(views, entry))
    nbytes = sum(view.source.nbytes(entry) for view in views)
    give_back(nbytes)
    return found, nbytes


def _in_blocks(views: Sequence[View], entry: Entry, first: int) -> Iterator[tuple[str, Difference]]:
    stored = [view.tensors(entry.native, slice(first, first + entry.experts)) for view in views]
    for key in itertools.chain(*entry.keys):
        a, b = (view.weight(key, tensors) for view, tensors in zip(views, stored, strict=True))
        yield key, difference(a, b)


def _in_rows(views: Sequence[View], entry: Entry) -> Iterator[tuple[str, Difference]]:
    ((key,),) = entry.keys
    steps = row_steps([view.source for view in views], entry)
    chunks = ([Weight(values=view.rows(entry, *step)) for view in views] for step in steps)
    yield key, total(difference(a, b, part=True) for a, b in chunks)
