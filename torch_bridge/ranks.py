"""Ranks that work together: rank 0 writes, the others send it what they hold, and all come to know how it ended."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TypeAlias, TypeVar, cast

import torch
import torch.distributed as dist

from minimax_jax.errors import CheckpointError, Problem
from minimax_jax.io.folder import appearing
from minimax_jax.jobs.team import PeerFailed, uninterrupted
from torch_bridge.homes import Home
from torch_bridge.mesh import Region

_T = TypeVar("_T")

_Failure: TypeAlias = tuple[type[CheckpointError], tuple[Problem, ...]]
_LOST = Problem(what="another rank failed", remedy="see what it says, then start again")

WRITER = 0
"""The rank that writes."""


def together() -> bool:
    """Whether there are other ranks."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def writes() -> bool:
    """Whether this is the rank that writes."""
    return not together() or dist.get_rank() == WRITER


def gather(home: Home, box: Region) -> torch.Tensor | None:
    """A rectangle of a whole tensor, on the rank that writes; None on the others.

    Where the tensor is sharded, every rank must call it alike. The parts travel as bytes: not every backend knows the
    dtypes of FP8 and bfloat16.

    Returns:
        A view where the writing rank holds all of `box`, else a copy.
    """
    holders = [] if home.layout is None else list(home.layout.holders(home.shape))
    if len(holders) <= 1:
        return _cut(home.local, home.region, box) if writes() else None
    out = torch.empty([len(part) for part in box], dtype=home.local.dtype, device=home.local.device)
    for rank, region in holders:
        common = _common(region, box)
        if all(common):
            piece = _travel(home, common, rank)
            if piece is not None:
                _cut(out, box, common).copy_(piece)
    return out if writes() else None


@contextlib.contextmanager
def appearing_for_all(destination: str | Path) -> Iterator[Path]:
    """`appearing` for all ranks together: rank 0 makes the folder and gives it its name; the others only fill it.

    Where torch is distributed this is a collective, and the block must end well, or fail, on all ranks alike.

    Raises:
        JobError: as `appearing`, on every rank; PeerFailed where rank 0 was stopped or failed by something else.
    """
    with contextlib.ExitStack() as stack:
        folder: Path | None = None
        failure: BaseException | None = None
        if writes():
            try:
                folder = stack.enter_context(appearing(destination))
            except BaseException as error:  # the others wait: they are told of it, and it is raised again
                failure = error
        yield agree(folder, failure)
        failure = None
        try:
            stack.close()
        except BaseException as error:
            failure = error
        agree(None, failure)


class Together:
    """All ranks at one job: when one fails, whatever the reason, all of them end it by an error, soon.

    Each of them calls `require_all_well` as often as the others do.
    """

    def __init__(self) -> None:
        self._known = False

    @contextlib.contextmanager
    def standing(self) -> Iterator[None]:
        """A context in which the failure of this rank is told to the others."""
        try:
            yield
        except BaseException as error:
            if together() and not self._known:
                self._tell(error)
            raise

    def require_all_well(self) -> None:
        """Wait until all ranks have come so far.

        Raises:
            CheckpointError: what another rank failed by; PeerFailed where that was no error of this library.
        """
        if not together():
            return
        for failed in filter(None, self._tell(None)):
            self._known = True
            raise failed[0](failed[1])

    def _tell(self, error: BaseException | None) -> list[_Failure | None]:
        told = _told(error)
        everyone: list[_Failure | None] = [None] * dist.get_world_size()
        with uninterrupted():
            dist.all_gather_object(everyone, told)
        return everyone


def agree(result: _T | None, failure: BaseException | None) -> _T:
    """The result of the rank that writes, on every rank.

    Raises:
        CheckpointError: its failure, on every rank; on the others PeerFailed where it was no error of this library.
    """
    if together():
        told = [(result, _told(failure))]
        with uninterrupted():
            dist.broadcast_object_list(told, src=WRITER)
        result, failed = told[0]
        failure = failure or (None if failed is None else failed[0](failed[1]))
    if failure is not None:
        raise failure
    return cast(_T, result)


def _told(error: BaseException | None) -> _Failure | None:
    """What other ranks are told of an error."""
    if error is None:
        return None
    return (type(error), error.problems) if isinstance(error, CheckpointError) else (PeerFailed, (_LOST,))


def _travel(home: Home, box: Region, holder: int) -> torch.Tensor | None:
    """`box` from the rank that holds it to the rank that writes; None on the others."""
    here = dist.get_rank()
    if here == holder:
        piece = _cut(home.local, home.region, box)
        if here == WRITER:
            return piece
        dist.send(piece.contiguous().view(torch.uint8), WRITER)
    elif here == WRITER:
        piece = torch.empty([len(part) for part in box], dtype=home.local.dtype, device=home.local.device)
        dist.recv(piece.view(torch.uint8), holder)
        return piece
    return None


def _common(one: Region, other: Region) -> Region:
    pairs = zip(one, other, strict=True)
    return tuple(range(max(a.start, b.start), min(a.stop, b.stop)) for a, b in pairs)


def _cut(tensor: torch.Tensor, held: Region, box: Region) -> torch.Tensor:
    """`box` of a tensor of which `tensor` is the region `held`; a view."""
    within = (
        slice(wanted.start - part.start, wanted.stop - part.start) for wanted, part in zip(box, held, strict=True)
    )
    return tensor[tuple(within)]
