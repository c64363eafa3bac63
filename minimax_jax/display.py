"""How results show themselves: in one line as text, whole in rich and in notebooks."""

from __future__ import annotations

import io
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table

_HTML_WIDTH = 140
"""Characters; wider tables are folded."""

_PAGE = '<pre style="white-space:pre;overflow-x:auto;line-height:normal;font-family:monospace">{code}</pre>'

_UNITS = ("B", "kB", "MB", "GB", "TB", "PB")


class Displayed:
    """A base of results: `repr` is one line, rich and notebooks show all that `views` gives."""

    __slots__ = ()

    def views(self) -> Iterable[Any]:
        """What there is to look at: lines of text and rich renderables, the first of them a line that sums it up."""
        raise NotImplementedError

    def __repr__(self) -> str:
        return f"<{type(self).__name__}: {plain(str(next(iter(self.views()))))}>"

    def __rich__(self) -> Any:
        """All of it, for rich; text from files is shown as it is and not taken for markup."""
        from rich.console import Group
        from rich.text import Text

        return Group(*(Text(plain(view)) if isinstance(view, str) else view for view in self.views()))

    def _repr_html_(self) -> str:
        """All of it, for notebooks."""
        from rich.console import Console

        console = Console(file=io.StringIO(), record=True, width=_HTML_WIDTH, force_jupyter=False, highlight=False)
        console.print(self)
        return console.export_html(inline_styles=True, code_format=_PAGE)


def plain(text: str) -> str:
    """`text` with control characters and half surrogates written out: names come from files, and a terminal obeys."""
    return "".join(char if char.isprintable() or char == "\n" else ascii(char)[1:-1] for char in text)


def counted(count: int, one: str, many: str | None = None) -> str:
    """How many of something: `1 file`, `2 files`, `3 matrices`."""
    return f"{count:,} {one if count == 1 else many or one + 's'}"


def table_of(*headers: str) -> Table:
    """A table without rows yet, and without a head where all headers are empty. Narrow, it folds; no cell is cut."""
    from rich.table import Column, Table

    return Table(*(Column(header, overflow="fold") for header in headers), show_header=any(headers), box=None)


def size(nbytes: float) -> str:
    """Bytes in decimal units, three digits: `230 GB`."""
    unit = 0
    while nbytes >= 999.5 and unit < len(_UNITS) - 1:
        nbytes, unit = nbytes / 1000, unit + 1
    digits = 0 if unit == 0 or nbytes >= 99.95 else 1 if nbytes >= 9.995 else 2
    return f"{nbytes:.{digits}f} {_UNITS[unit]}"
