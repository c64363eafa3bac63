"""What stands near a path that is not there, for messages."""

from __future__ import annotations

import difflib
import itertools
import os
from pathlib import Path

_MOST_NAMES = 1000
"""Names of a folder that are looked at: more take time, and the error that waits for this does not get better."""


def did_you_mean(path: Path, *more: str) -> str | None:
    """`did you mean m2-native?` for a path that is not there, where one with a name like it is; else None.

    The name may be that of any step of the path; upper and lower case are alike.

    Args:
        path: what was asked for.
        more: what else there is to say to it, behind that or alone.
    """
    return " ".join(filter(None, (_question(path), *more))) or None


def _question(path: Path) -> str | None:
    missing = path
    while not os.path.lexists(missing.parent):
        missing = missing.parent
    if os.path.lexists(missing):
        return None
    names = {name.casefold(): name for name in _names(missing.parent)}
    close = difflib.get_close_matches(missing.name.casefold(), names)
    near = (missing.with_name(names[name]) / path.relative_to(missing) for name in close)
    return next((f"did you mean {found}?" for found in near if found.exists()), None)


def _names(folder: Path) -> list[str]:
    try:
        with os.scandir(folder) as entries:
            return [entry.name for entry in itertools.islice(entries, _MOST_NAMES)]
    except OSError:
        return []
