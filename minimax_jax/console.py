"""The terminal: results on stdout, progress and errors on stderr."""

from __future__ import annotations

import json
import mmap
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from minimax_jax.display import plain, size

if TYPE_CHECKING:
    from minimax_jax.errors import CheckpointError
    from minimax_jax.progress import Progress

_LINE_SECONDS = 10
"""Time between plain progress lines where there is no terminal."""

_STATM = Path("/proc/self/statm")
"""Where Linux tells the memory of this process, in pages: all of it, then what is in memory (proc_pid_statm(5))."""

_ENDLESS = 10_000
"""Width of a page that nobody looks at."""

Listener = Callable[["Progress"], None]

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Output:
    """Where a command says what it has to say.

    Attributes:
        as_json: results as one JSON document instead of text.
        quiet: no progress and no hints.
        verbose: all rows of tables, all problems of an error and where it arose.
    """

    as_json: bool = False
    quiet: bool = False
    verbose: bool = False

    def show(self, document: Callable[[T], Any], view: Callable[[T], Iterable[Any]], result: T) -> None:
        """Print a result on stdout: what `document` makes of it as JSON, or the renderables of `view`."""
        if self.as_json:
            _show_json(document(result))
        else:
            _show(view(result))

    def hint(self, title: str, code: Sequence[str]) -> None:
        """Print lines of Python to go on with, where there is somebody to read them."""
        if code and not self.quiet and not self.as_json:
            _show([f"{title}\n", _code(code)])

    def step(self, line: str) -> None:
        """Print a line on the way to a result: on stderr where stdout is for JSON."""
        click.echo(plain(line), err=self.as_json)

    def error(self, error: CheckpointError) -> None:
        """Print an error on stderr; as a JSON document on stdout as well where that was asked for."""
        notes = getattr(error, "__notes__", [])
        if self.verbose:
            click.echo(plain("".join(traceback.format_exception(error))), err=True)
        _label("error: ", "\n".join([error.text() if self.verbose else str(error), *notes]))
        if self.as_json:
            fields = ("what", "file", "key", "expected", "got", "remedy")
            problems = [{name: getattr(problem, name) for name in fields} for problem in error.problems]
            _show_json({"error": type(error).__name__, "problems": problems, "notes": notes})

    def interrupt(self, error: KeyboardInterrupt) -> None:
        """Say on stderr that the command was stopped, and what is left; as a JSON document where that was asked for."""
        notes = getattr(error, "__notes__", [])
        _label("interrupted", "".join(f"\n{note}" for note in notes))
        if self.as_json:
            _show_json({"error": "Interrupted", "problems": [], "notes": notes})

    def usage(self, error: click.UsageError) -> None:
        """Print what is wrong with a command as a JSON document, where that was asked for; click says it on stderr."""
        if self.as_json:
            _show_json({"error": type(error).__name__, "problems": [{"what": error.format_message()}], "notes": []})

    @contextmanager
    def progress(self, what: str) -> Iterator[Listener | None]:
        """A listener for a job's progress: a bar on a terminal, a plain line now and then elsewhere."""
        if self.quiet:
            yield None
        elif sys.stderr.isatty():
            with _bar(what) as listener:
                yield listener
        else:
            yield _Lines(what)


def _show(views: Iterable[Any]) -> None:
    """Print renderables on stdout; nothing is cut or wrapped where stdout is not a terminal."""
    from rich.console import Console

    console = Console(width=None if sys.stdout.isatty() else _ENDLESS, highlight=False)
    for view in views:
        with console.capture() as captured:  # by itself it takes a reader that is gone for a failure, and exits
            console.print(plain(view), markup=False) if isinstance(view, str) else console.print(view)
        click.echo(captured.get(), nl=False)


def _code(lines: Sequence[str]) -> Any:
    """Python to look at; on a terminal in colours, and never wrapped by anything but the terminal."""
    from rich.text import Text

    return Text("\n".join(f"    {plain(line)}" for line in lines), style="cyan", no_wrap=True, overflow="ignore")


def _label(label: str, text: str) -> None:
    """Print a text on stderr behind a label that is red on a terminal; nothing is cut or wrapped."""
    from rich.console import Console
    from rich.text import Text

    console = Console(stderr=True, highlight=False, soft_wrap=True)
    console.print(Text.assemble((label, "red"), plain(text)))


def _show_json(document: Any) -> None:
    click.echo(json.dumps(document, indent=2))


class Terminated(KeyboardInterrupt):
    """The process was asked to end by SIGTERM, as schedulers do: as clean a stop as that of Ctrl-C."""


@contextmanager
def stoppable() -> Iterator[None]:
    """A context in which SIGTERM raises `Terminated`; in a thread other than the main one it changes nothing."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def terminate(*_: object) -> None:
        raise Terminated

    before = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def let_go_of_stdout() -> None:
    """Point stdout nowhere, so that what is still to be flushed to a reader that is gone is no error at the end."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)


@contextmanager
def _bar(what: str) -> Iterator[Listener]:
    from rich import progress
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn

    rate, memory = TextColumn("{task.fields[rate]}"), TextColumn("{task.fields[memory]}")
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        rate,
        TimeRemainingColumn(),
        memory,
    )
    with progress.Progress(*columns, console=Console(stderr=True)) as bar:
        tasks = {what: bar.add_task(what, total=None, rate="", memory="")}

        def listen(moment: Progress) -> None:
            step, done, total = moment.step or what, moment.done_bytes, moment.total_bytes
            if step not in tasks:
                tasks[step] = bar.add_task(step, total=None, rate="", memory="")
            bar.update(tasks[step], total=total, completed=done, rate=_rate(moment), memory=_memory())

        yield listen


class _Lines:
    """Prints a line with rate, memory and time left, at most one in ten seconds."""

    def __init__(self, what: str):
        self._what = what
        self._next = time.monotonic() + _LINE_SECONDS

    def __call__(self, moment: Progress) -> None:
        if time.monotonic() < self._next:
            return
        self._next = time.monotonic() + _LINE_SECONDS
        share = moment.done_bytes / max(moment.total_bytes, 1)
        facts = (f"{share:.0%}", _rate(moment), _memory(), f"{_left(moment)} left")
        click.echo(f"{moment.step or self._what}: {', '.join(filter(None, facts))}", err=True)


def _rate(moment: Progress) -> str:
    return f"{size(moment.done_bytes / max(moment.seconds, 1e-9))}/s"


def _left(moment: Progress) -> str:
    from minimax_jax.jobs.report import duration

    rate = moment.done_bytes / max(moment.seconds, 1e-9)
    return duration(round((moment.total_bytes - moment.done_bytes) / max(rate, 1)))


def _memory() -> str:
    """The memory that the process has now; nothing where the system does not tell."""
    try:
        pages = int(_STATM.read_text().split()[1])
    except (OSError, ValueError, IndexError):
        return ""
    return f"{size(pages * mmap.PAGESIZE)} of memory"
