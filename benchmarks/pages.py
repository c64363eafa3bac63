"""Parts of the documentation that benchmarks write."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

DOCS = Path("docs")
_END = "<!-- end -->"


def put(page: Path, command: str, parts: Iterable[str]) -> None:
    """Put paragraphs and tables on a page, where its marks say that this command writes.

    Raises:
        ValueError: there are no such marks.
    """
    mark = f"<!-- begin: written by `{command}` -->"
    text = page.read_text()
    begin = text.index(mark) + len(mark)
    page.write_text("\n".join([text[:begin], *parts, text[text.index(_END, begin) :]]))


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [columns, ("---",) * len(columns), *rows]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)
