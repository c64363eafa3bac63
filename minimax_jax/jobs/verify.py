"""Is it the same checkpoint? Compares two, in any two layouts, tensor by tensor, streaming, and certifies what it saw.

Both are looked at in their Hugging Face form: the same names, each weight as it is stored (FP8 codes and scales, or
floats). The digest of a tensor is the SHA-256 of its bytes in that form, so it does not depend on layout or sharding.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

import numpy as np

from minimax_jax.dtypes import NAMES
from minimax_jax.errors import JobError, LayoutError, Problem, raise_if
from minimax_jax.io.reader import Reader
from minimax_jax.jobs.compare import Array, Comparison, Relation, Weight, bytes_of, compare, merge
from minimax_jax.jobs.heap import give_back
from minimax_jax.jobs.plan import require_workers
from minimax_jax.jobs.read import read_leaf
from minimax_jax.jobs.source import Source, batches
from minimax_jax.layout.check import Layout
from minimax_jax.layout.specs import Entry, total_bytes
from minimax_jax.layout.table import SCALE_SUFFIX
from minimax_jax.leaves import emit
from minimax_jax.progress import Progress, Ticker

By: TypeAlias = Literal["bytes", "value"]

_PIECE_BYTES = 32 * 2**20
"""Most bytes of one checkpoint in one piece of work; with its copies and that of the other it takes five times that."""

_IDLE_FIELDS = frozenset(("dtype", "weight_block_size", "modules_to_not_convert", "max_position_embeddings", "extra"))
"""Fields of a config that say how a checkpoint is stored, or nothing about what the model computes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Digest:
    """One tensor of the Hugging Face form: what it is, and the SHA-256 of its bytes."""

    key: str
    dtype: str
    shape: tuple[int, ...]
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Digested:
    """One checkpoint with the digest of every stored tensor of its Hugging Face form, in canonical order."""

    path: Path
    layout: Layout
    nbytes: int
    digests: tuple[Digest, ...]

    @property
    def sha256(self) -> str:
        """One digest for the whole: over name, dtype, shape and digest of each tensor, in the order of names."""
        lines = (f"{d.key} {d.dtype} {list(d.shape)} {d.sha256}\n" for d in self.digests)
        return hashlib.sha256("".join(sorted(lines)).encode()).hexdigest()


@dataclass(frozen=True, kw_only=True)
class Verification:
    """What `verify` saw.

    Attributes:
        by: what was asked for.
        checkpoints: the one or two that were read.
        comparisons: every weight of the two; empty for one checkpoint alone.
    """

    by: By
    checkpoints: tuple[Digested, ...]
    comparisons: tuple[Comparison, ...]

    @property
    def good(self) -> bool:
        """Whether all weights agree as asked."""
        return not any(self.failures)

    @property
    def failures(self) -> Iterator[Comparison]:
        """The weights that do not agree as asked."""
        allowed = ("identical",) if self.by == "bytes" else ("identical", "equal")
        return (comparison for comparison in self.comparisons if comparison.relation not in allowed)

    def count(self, relation: Relation) -> int:
        """How many weights have this relation."""
        return sum(comparison.relation == relation for comparison in self.comparisons)


def verify(
    first: Source,
    second: Source | None = None,
    *,
    by: By = "value",
    workers: int = 2,
    progress: Callable[[Progress], None] | None = None,
) -> Verification:
    """Compare two checkpoints weight by weight, or digest one. Memory does not grow with the checkpoint.

    Args:
        first: an opened checkpoint.
        second: what to hold against it; None only digests `first`.
        by: `bytes` asks for the same dtypes and bytes; `value` for the same weights, FP8 dequantised.
        workers: threads.
        progress: called on the calling thread as the work goes on.

    Raises:
        LayoutError: the two are not of the same architecture: other sizes, or other numbers that change what the model
            computes, such as `rotary_dim`.
        JobError: no such `by`, or no workers.
        FormatError: a file changed or ends too early while it is read.
    """
    if by not in get_args(By):
        raise JobError(Problem(what="no such way to compare", expected=" or ".join(get_args(By)), got=str(by)))
    require_workers(workers)
    sources = (first,) if second is None else (first, second)
    _require_same_architecture(sources[0], sources[-1])
    ticker = Ticker(sum(source.checkpoint.nbytes for source in sources), progress)
    looks: list[_Look] = []
    with contextlib.ExitStack() as stack:
        views = [View(source, stack.enter_context(Reader(source.checkpoint))) for source in sources]
        pool = stack.enter_context(ThreadPoolExecutor(workers, thread_name_prefix="verify"))
        stack.callback(pool.shutdown, cancel_futures=True)
        for look in pool.map(functools.partial(_look, views), _pieces(sources)):
            looks.append(look)
            ticker.tick(look.nbytes)
    return Verification(
        by=by,
        checkpoints=tuple(_digested(source, which, looks) for which, source in enumerate(sources)),
        comparisons=tuple(comparison for look in looks for comparison in look.comparisons),
    )


def _digested(source: Source, which: int, looks: Sequence[_Look]) -> Digested:
    digests = tuple(digest for look in looks for digest in look.digests[which])
    layout, nbytes = source.survey.layout, source.checkpoint.nbytes
    return Digested(path=source.path, layout=layout, nbytes=nbytes, digests=digests)


class View:
    """A checkpoint seen in the Hugging Face form, whatever its layout."""

    def __init__(self, source: Source, reader: Reader):
        self.source = source
        self.reader = reader

    def tensors(self, native: str, experts: slice) -> dict[str, Array]:
        """The stored Hugging Face tensors of some experts of a block-scaled entry."""
        entry = self.source.survey.specs.by_native[native].narrow(experts)
        if self.source.survey.layout == "hf":
            infos = self.source.checkpoint.tensors
            return {spec.key: self.reader.read(infos[spec.key]) for spec in self.source.specs(entry)}
        leaf = read_leaf(self.source, self.reader, entry, experts.start)
        return {key: np.asarray(tensor) for key, tensor in emit(entry, leaf, None).items()}

    def weight(self, key: str, tensors: Mapping[str, Array]) -> Weight:
        """One of the weights in what `tensors` returned."""
        scales = tensors.get(key + SCALE_SUFFIX)
        return Weight(values=tensors[key], scales=scales, block=self.source.config.block)

    def rows(self, entry: Entry, start: int, stop: int) -> Array:
        """Rows of the one tensor of an entry that is not block-scaled."""
        (spec,) = self.source.specs(entry)
        return self.reader.read(self.source.checkpoint.tensors[spec.key], start, stop)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Look:
    """What was seen in one piece of work."""

    digests: list[list[Digest]]
    comparisons: list[Comparison]
    nbytes: int


def _pieces(sources: Sequence[Source]) -> Iterator[tuple[Entry, int]]:
    """Every entry of the first checkpoint, some experts at a time, with the first expert of each piece."""
    for entry in sources[0].survey.entries:
        yield from batches(entry, _most_bytes(sources, entry), _PIECE_BYTES)


def _most_bytes(sources: Sequence[Source], entry: Entry) -> int:
    return max(total_bytes(source.specs(entry)) for source in sources)


def _look(views: Sequence[View], piece: tuple[Entry, int]) -> _Look:
    entry, first = piece
    look = _look_at_blocks(views, entry, first) if entry.row.scaled else _look_at_rows(views, entry)
    give_back(look.nbytes)
    return look


def _look_at_blocks(views: Sequence[View], entry: Entry, first: int) -> _Look:
    stored = [view.tensors(entry.native, slice(first, first + entry.experts)) for view in views]
    digests = [[_digest(key, tensor) for key, tensor in tensors.items()] for tensors in stored]
    comparisons = [
        compare(key, *(view.weight(key, tensors) for view, tensors in zip(views, stored, strict=True)))
        for key in itertools.chain(*entry.keys)
        if len(views) == 2
    ]
    return _Look(digests=digests, comparisons=comparisons, nbytes=_read_bytes(views, entry))


def _look_at_rows(views: Sequence[View], entry: Entry) -> _Look:
    """Looks at some rows at a time: embeddings are large."""
    ((key,),) = entry.keys
    rows = entry.shape[0]
    step = max(1, _PIECE_BYTES * rows // _most_bytes([view.source for view in views], entry))
    hashes = [hashlib.sha256() for _ in views]
    comparisons: list[Comparison] = []
    for start in range(0, rows, step):
        chunks = [view.rows(entry, start, min(start + step, rows)) for view in views]
        for digest, chunk in zip(hashes, chunks, strict=True):
            digest.update(bytes_of(chunk).data)
        if len(views) == 2:
            comparisons.append(compare(key, *(Weight(values=chunk) for chunk in chunks)))
    digests = [
        [Digest(key=key, dtype=view.source.survey.dtypes[entry.native], shape=entry.shape, sha256=digest.hexdigest())]
        for view, digest in zip(views, hashes, strict=True)
    ]
    merged = [merge(comparisons)] if comparisons else []
    return _Look(digests=digests, comparisons=merged, nbytes=_read_bytes(views, entry))


def _read_bytes(views: Sequence[View], entry: Entry) -> int:
    return sum(total_bytes(view.source.specs(entry)) for view in views)


def _digest(key: str, tensor: Array) -> Digest:
    sha256 = hashlib.sha256(bytes_of(tensor).data).hexdigest()
    return Digest(key=key, dtype=NAMES[tensor.dtype], shape=tensor.shape, sha256=sha256)


def _require_same_architecture(first: Source, second: Source) -> None:
    configs = [_architecture(source) for source in (first, second)]
    what, file = "the two checkpoints are not of the same architecture", str(second.path)
    raise_if(
        (
            Problem(what=what, file=file, key=name, expected=str(ours), got=str(theirs))
            for (name, ours), theirs in zip(configs[0].items(), configs[1].values(), strict=True)
            if ours != theirs
        ),
        LayoutError,
    )


def _architecture(source: Source) -> dict[str, Any]:
    """What must be alike in two checkpoints, by name: their configs, and whether names begin with `model.`."""
    fields = dataclasses.fields(source.config)
    compared = {field.name: getattr(source.config, field.name) for field in fields if field.name not in _IDLE_FIELDS}
    return compared | {"name of the first tensor": next(source.survey.entries).native}
