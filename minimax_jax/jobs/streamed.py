"""Targets in files that are not safetensors: native checkpoints, or those of a further layout, as others store them."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING, Any, cast

from minimax_jax.display import Displayed
from minimax_jax.errors import JobError, Problem
from minimax_jax.layout.forms import Layout

if TYPE_CHECKING:
    from minimax_jax.jobs.run import Report
    from minimax_jax.jobs.scales import Remark
    from minimax_jax.jobs.source import Source

GROUP = "minimax_jax.targets"
"""Entry points of this group are functions that write a checkpoint in another form. Each is called with an opened
source and the destination, and by keyword with what `convert` got: dtype (by format name), max_memory_bytes, workers,
progress, and check, restart and certify where it has such parameters (see `goes_on`, `certifies`); it returns a Report.
A function `plan` in the same module is called with the source, and by keyword with dtype, max_memory_bytes and workers;
it returns a StreamedPlan."""

_OWN: Mapping[str, tuple[str, Layout]] = {
    "orbax": ("", "native"),
    "maxtext": ("_maxtext", "maxtext"),
    "maxtext-unscanned": ("_maxtext_unscanned", "maxtext-unscanned"),
}
"""Those of this package, by name: what the names of their functions end with, and whose names their arrays have."""

_WRITERS, _PLANNERS = "minimax_jax.jobs.orbax:write", "minimax_jax.jobs.orbax_plan:foresee"


@dataclass(frozen=True, kw_only=True, repr=False)
class StreamedPlan(Displayed):
    """What a conversion to such a target would do. What its files are is for the library to say that writes them.

    Attributes:
        source: what is read.
        to: the target.
        dtype: stored dtype of block-scaled weights.
        units: pieces of work.
        tensors: how many tensors are written.
        read_bytes: bytes of tensors that will be read.
        write_bytes: bytes of tensors that will be written: about the disk that is needed.
        peak_bytes: most memory over what the process has at the start.
        workers: how many units run at a time.
    """

    source: Source
    to: str
    dtype: str
    units: int
    tensors: int
    read_bytes: int
    write_bytes: int
    peak_bytes: int
    workers: int

    @property
    def remarks(self) -> tuple[Remark, ...]:
        """What there is to know beforehand."""
        from minimax_jax.jobs.scales import scale_remarks

        return tuple(scale_remarks(self.source, self.dtype, beside=False))

    def views(self) -> Iterable[Any]:
        """What there is to look at."""
        from minimax_jax.jobs.report import plan_view

        return plan_view(self)


def streamed_targets() -> Mapping[str, EntryPoint]:
    """The further targets, and what installed packages offer, by name; none of them is imported for it."""
    own = {name: EntryPoint(name, _WRITERS + suffix, GROUP) for name, (suffix, _) in _OWN.items()}
    return {**{point.name: point for point in entry_points(group=GROUP)}, **own}


def streamed_layout(name: str) -> Layout:
    """Whose names the tensors of a further target have."""
    return _OWN[name][1] if name in _OWN else "native"


def load_target(name: str) -> Callable[..., Report]:
    """The function that writes a further target.

    Raises:
        JobError: something is not installed that it takes.
    """
    return cast("Callable[..., Report]", _loaded(name, streamed_targets()[name]))


def goes_on(write: Callable[..., Report]) -> bool:
    """Whether a function that writes a further target goes on after a stop: then it takes `check` and `restart`."""
    return {"check", "restart"} <= inspect.signature(write).parameters.keys()


def certifies(write: Callable[..., Report]) -> bool:
    """Whether a function that writes a further target can leave a certificate in it: then it takes `certify`."""
    return "certify" in inspect.signature(write).parameters


def load_planner(name: str) -> Callable[..., StreamedPlan]:
    """The function that plans a further target.

    Raises:
        JobError: something is not installed that it takes, or the package that adds the target cannot plan it.
    """
    if name in _OWN:
        planner = EntryPoint(name, _PLANNERS + _OWN[name][0], GROUP)
        return cast("Callable[..., StreamedPlan]", _loaded(name, planner))
    point = streamed_targets()[name]
    _loaded(name, point)
    found = getattr(importlib.import_module(point.module), "plan", None)
    if found is None:
        what, remedy = f"the target {name} cannot be planned", "convert without a plan, or ask the package that adds it"
        raise JobError(Problem(what=what, got=f"{point.module} has no function plan", remedy=remedy))
    return cast("Callable[..., StreamedPlan]", found)


def _loaded(name: str, point: EntryPoint) -> Any:
    try:
        return point.load()
    except ImportError as error:
        remedy = f"pip install 'minimax_jax[{error.name}]'" if error.name == "torch" else "install what is named here"
        what = f"something is not installed that the target {name} takes"
        raise JobError(Problem(what=what, got=str(error), remedy=remedy)) from error
