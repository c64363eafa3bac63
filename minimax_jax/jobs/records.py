"""What a journal says of the finished units of a conversion, and how units are worked through with one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal, Protocol, TypeAlias, TypeVar

from minimax_jax.errors import JobError, Problem, raise_if
from minimax_jax.io.journal import read_journals

Check: TypeAlias = Literal["none", "sample", "all"]
"""Which units to read back from the disk before the destination takes its name."""

Record: TypeAlias = Mapping[str, Any]
"""What the journal says of a finished unit: its name, the digest of what it wrote, and of weights that it quantised,
how many kept their source scales and the names of those that did not."""

UNIT, DIGEST, KEPT, FRESH = "unit", "xxh3_128", "kept_scales", "fresh_scales"

_KINDS = {UNIT: str, DIGEST: str, KEPT: int, FRESH: list}

_SAMPLE = 16
"""One unit in so many is read back in a check of a sample."""

_SYNC_BYTES = 2**30
"""Most bytes of input whose work a power cut may undo."""


class Work(Protocol):
    """A piece of work, as far as it is told how far the work is."""

    @property
    def read_bytes(self) -> int:
        """Bytes of tensors that are read."""


UnitT = TypeVar("UnitT", bound=Work)
NamedT = TypeVar("NamedT", contravariant=True)


class Held(Protocol[NamedT]):
    """Who knows of units what the journal says of them, and whether it is so."""

    @property
    def records(self) -> Mapping[str, Record]:
        """What is done, by the name of the unit."""

    def name(self, unit: NamedT, /) -> str:
        """What the journal calls a unit."""

    def holds(self, unit: NamedT, record: Record, /) -> bool:
        """Whether the output holds what a record says; it is read for it."""


class Saver:
    """Makes work survive a power cut, from time to time."""

    def __init__(self, sync: Callable[[], object]):
        """Ready; `sync` makes all that is done so far survive: first the data, then the journal."""
        self._sync, self._unsaved_bytes = sync, 0

    def did(self, nbytes: int) -> None:
        """Work is done on so many bytes of input."""
        self._unsaved_bytes += nbytes
        if self._unsaved_bytes >= _SYNC_BYTES:
            self._unsaved_bytes = 0
            self._sync()


def record_of(name: str, digest: str, kept: Mapping[str, bool]) -> Record:
    """The record of a unit, `kept` being the weights that it quantised: whether they kept their source scales."""
    fresh = [key for key, same in kept.items() if not same]
    return {UNIT: name, DIGEST: digest, KEPT: len(kept) - len(fresh), FRESH: fresh}


def noted(folder: Path, stamp: Mapping[str, str]) -> dict[str, Record]:
    """What the journals beside a folder say, by the name of the unit; the last word counts.

    Raises:
        JobError: a journal is of another job.
    """
    return {record[UNIT]: record for record in read_journals(folder.parent, stamp) if _is_record(record)}


def quantised(records: Mapping[str, Record]) -> tuple[int, tuple[str, ...]]:
    """How many weights kept their source scales, and the names of those that did not, sorted."""
    kept = sum(record[KEPT] for record in records.values())
    return kept, tuple(sorted(key for record in records.values() for key in record[FRESH]))


def work(
    do: Callable[[UnitT], object],
    units: Sequence[UnitT],
    workers: int,
    *,
    after: Callable[[UnitT], object],
    sync: Callable[[], object],
) -> None:
    """Do units on some threads; the first error stops the rest.

    Args:
        do: does a unit, or finds it done.
        units: the work.
        workers: how many threads.
        after: called on the calling thread after each unit.
        sync: makes what is done survive a power cut; called there too, from time to time.
    """
    saver = Saver(sync)
    with ExitStack() as stack:
        pool = stack.enter_context(ThreadPoolExecutor(workers, thread_name_prefix="convert"))
        stack.callback(pool.shutdown, cancel_futures=True)
        futures = {pool.submit(do, unit): unit for unit in units}
        for future in as_completed(futures):
            future.result()
            after(futures[future])
            saver.did(futures[future].read_bytes)


def require_true(worker: Held[NamedT], units: Sequence[NamedT], check: Check, folder: Path) -> None:
    """Read back units that are done, as many as `check` says.

    Raises:
        JobError: what was read back is not what was written.
    """
    checked = {"none": units[:0], "sample": units[::_SAMPLE], "all": units}[check]
    raise_if(_untrue(worker, checked, folder), JobError)


def _untrue(worker: Held[NamedT], units: Sequence[NamedT], folder: Path) -> Iterator[Problem]:
    for unit in units:
        name = worker.name(unit)
        if not worker.holds(unit, worker.records[name]):
            what, remedy = "the disk does not hold what was written", "check the disk, then run the same command again"
            yield Problem(what=what, file=str(folder), key=name, remedy=remedy)


def _is_record(found: Mapping[str, Any]) -> bool:
    """Whether a line of a journal is a record."""
    return all(isinstance(found.get(name), kind) for name, kind in _KINDS.items())
