"""Is it the same checkpoint? Compares two, in any two layouts, tensor by tensor, streaming, and certifies what it saw.

Both are looked at in their Hugging Face form: the same names, each weight as it is stored (FP8 codes and scales, or
floats). The digest of a tensor is the SHA-256 of its bytes in that form, so it does not depend on layout or sharding.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import get_args

import numpy as np

from minimax_jax.errors import JobError, Problem, RequestError
from minimax_jax.jobs.architecture import require_same_architecture
from minimax_jax.jobs.budget import DEFAULT_WORKERS, require_workers
from minimax_jax.jobs.certified import Certificate, Certified
from minimax_jax.jobs.compare import RELATIONS
from minimax_jax.jobs.digests import config_digest, file_digests, left_out_digests, overall
from minimax_jax.jobs.held import Held, hold
from minimax_jax.jobs.look import Look, look_at, pieces, room_bytes
from minimax_jax.jobs.numbers import merged
from minimax_jax.jobs.sample import Sample, draw
from minimax_jax.jobs.shared import shared
from minimax_jax.jobs.source import Source
from minimax_jax.jobs.team import SOLO, Team
from minimax_jax.jobs.verification import By, Digested, LayerSummary, Verification
from minimax_jax.jobs.view import View
from minimax_jax.layout.specs import Entry
from minimax_jax.layout.table import SCALE_SUFFIX
from minimax_jax.ops.workspace import Workspaces
from minimax_jax.progress import Progress, Ticker


def verify(
    first: Source,
    second: Source | None = None,
    *,
    by: By = "value",
    sample: str | None = None,
    certificate: Certificate | None = None,
    workers: int = DEFAULT_WORKERS,
    team: Team = SOLO,
    progress: Callable[[Progress], None] | None = None,
) -> Verification:
    """Compare two checkpoints weight by weight, or digest one. Memory does not grow with the checkpoint.

    Args:
        first: an opened checkpoint.
        second: what to hold against it; None only digests `first`.
        by: `bytes` asks for the same dtypes and bytes; `value` for the same weights, FP8 dequantised. Tensors are held
            against a certificate byte for byte in any case; `bytes` asks for the same files of weights as well.
        sample: look at a part only: a share such as `5%` or a number of native tensors such as `40`, always the same.
        certificate: an earlier one to hold `first` against, byte for byte; where that is of a sample, only what it
            speaks of is looked at.
        workers: threads.
        team: the processes that share the work; all of them call this with the same arguments, and get the same.
        progress: called on the calling thread as the work goes on; in a team, of the share of this process.

    Raises:
        LayoutError: the two are not of the same architecture: other sizes, or other numbers that change what the model
            computes, such as `rotary_dim`.
        RequestError: no such `by` or `sample`, no workers, or a certificate for two checkpoints.
        JobError: nothing to look at.
        FormatError: a file changed or ends too early while it is read.
        PeerFailed: another process of the team failed.
    """
    if by not in get_args(By):
        raise RequestError(Problem(what="no such way to compare", expected=" or ".join(get_args(By)), got=str(by)))
    require_workers(workers)
    sources = (first,) if second is None else (first, second)
    require_same_architecture(sources[0], sources[-1])
    taken, entries = _chosen(sources, sample, certificate)
    looks = shared(team, _look_at_all(sources, entries, workers, team, progress))
    checkpoints = tuple(_digested(source, which, looks) for which, source in enumerate(sources))
    return Verification(
        by=by,
        sample=taken,
        checkpoints=checkpoints,
        comparisons=tuple(comparison for look in looks for comparison in look.comparisons),
        layers=tuple(_layers(looks)),
        held=None if certificate is None else _hold(certificate, first, checkpoints[0], entries, by),
    )


def _chosen(
    sources: Sequence[Source], sample: str | None, certificate: Certificate | None
) -> tuple[Sample | None, Sequence[Entry]]:
    """The sample that was asked for, if any, and the entries to look at."""
    entries = tuple(sources[0].survey.entries)
    taken, chosen = (None, entries) if sample is None else draw(entries, sample)
    if certificate is None:
        return taken, chosen
    if len(sources) == 2:
        remedy = "verify one checkpoint against the certificate, then compare the two"
        raise RequestError(Problem(what="two checkpoints and a certificate", file=str(certificate.file), remedy=remedy))
    if certificate.sampled:
        told = {key for checkpoint in certificate.checkpoints for key in checkpoint.tensors}
        chosen = tuple(entry for entry in chosen if not told.isdisjoint(itertools.chain(*entry.keys)))
        taken = Sample(asked=sample or "that of the certificate", entries=len(chosen), of=len(entries))
    if not chosen:
        what, remedy = "the certificate speaks of nothing in the sample", "take a larger sample"
        raise JobError(Problem(what=what, file=str(certificate.file), remedy=remedy))
    return taken, chosen


def _look_at_all(
    sources: Sequence[Source],
    entries: Sequence[Entry],
    workers: int,
    team: Team,
    progress: Callable[[Progress], None] | None,
) -> list[Look]:
    """What there is to see of all that falls to this process."""
    todo = list(pieces(sources, entries))[team.index :: team.count]
    ticker = Ticker(sum(source.nbytes(entry) for source in sources for entry, _ in todo), progress)
    looks: list[Look] = []
    with contextlib.ExitStack() as stack:
        rooms = Workspaces(room_bytes(sources, todo))
        views = [View(source, stack.enter_context(source.reader())) for source in sources]
        pool = stack.enter_context(ThreadPoolExecutor(workers, thread_name_prefix="verify"))
        stack.callback(pool.shutdown, cancel_futures=True)
        for look in pool.map(functools.partial(look_at, views, rooms), todo):
            looks.append(look)
            ticker.tick(look.nbytes)
    return looks


def _digested(source: Source, which: int, looks: Sequence[Look]) -> Digested:
    return Digested(
        path=source.path,
        layout=source.survey.layout,
        stored=len(source.checkpoint.tensors),
        nbytes=source.checkpoint.nbytes,
        digests=tuple(digest for look in looks for digest in look.digests[which]),
        config=config_digest(source),
        files=tuple(file_digests(source)),
        unusual=merged(found for look in looks for found in look.unusual[which]),
        unread=tuple(sorted(source.config.extra)),
        left_out=source.left_out,
        aside=tuple(left_out_digests(source)),
    )


def _layers(looks: Sequence[Look]) -> Iterator[LayerSummary]:
    """The layers in the order in which they were looked at; what is outside of them comes first."""
    by_layer: dict[int | None, list[Look]] = {None: []}
    for look in looks:
        by_layer.setdefault(look.layer, []).append(look)
    for layer, group in by_layer.items():
        if not group:
            continue
        compared = [comparison for look in group for comparison in look.comparisons]
        each = [[digest for look in group for digest in look.digests[which]] for which in range(len(group[0].digests))]
        yield LayerSummary(
            layer=layer,
            tensors=tuple(map(len, each)),
            sha256=tuple(map(overall, each)),
            counts={name: sum(c.relation == name for c in compared) for name in RELATIONS} if compared else {},
            differing=sum(comparison.differing for comparison in compared),
            max_abs=float(np.max([comparison.max_abs for comparison in compared])) if compared else 0.0,
        )


def _hold(certificate: Certificate, source: Source, seen: Digested, entries: Sequence[Entry], by: By) -> Held:
    chosen = {key for entry in entries for key in itertools.chain(*entry.keys)}
    places = source.survey.specs.places

    def looked_at(key: str) -> bool:
        return key not in places or key.removesuffix(SCALE_SUFFIX) in chosen

    ours = Certified(
        path=str(seen.path),
        layout=seen.layout,
        config=seen.config,
        tensors={digest.key: digest for digest in seen.digests},
        left_out={digest.key: digest for digest in seen.aside},
        files={file.name: file for file in seen.files},
    )
    return hold(certificate, ours, looked_at, same_files=by == "bytes")
