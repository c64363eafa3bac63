"""Making records by the 100,000."""

from __future__ import annotations

import functools
import gc
from collections.abc import Callable
from typing import ParamSpec, TypeVar

_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")


def without_collector(function: Callable[_Arguments, _Result]) -> Callable[_Arguments, _Result]:
    """A decorator for what makes many records and no cycles: Python does not search for cycles while it runs.

    Python searches each time that some more objects were made, at times through all that there are. With jax loaded,
    opening and planning a checkpoint of 96,103 tensors would spend half of its time on that. Objects outside of cycles
    are freed at once all the same. Mercurial does so too (`nogc` of its util.py).

    The collector is that of the whole process. Threads need no lock: whoever switched it off switches it on again, so
    that it is on at the end if it was at the start, and some function at worst runs with it.
    """

    @functools.wraps(function)
    def wrapped(*args: _Arguments.args, **kwargs: _Arguments.kwargs) -> _Result:
        if not gc.isenabled():
            return function(*args, **kwargs)
        gc.disable()
        try:
            return function(*args, **kwargs)
        finally:
            gc.enable()

    return wrapped
