"""Pages whose code blocks are run as printed: Python in this process, shell in bash, both in a folder for each page.

`python` runs in one namespace for the page. `console` holds commands behind `$ `; what stands below one is its standard
output, or the standard error where it fails, and has to be as printed (`...` stands for anything). A command may fail
only if it says `error:` there. `bash` is a script. `text` is not code. All other blocks say in their title what they
need that a test has not, and are not run.
"""

import doctest
import os
import re
import subprocess
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import compiled
from sybil import Document
from sybil.evaluators.python import PythonEvaluator
from sybil.parsers.markdown.lexers import RawFencedCodeBlockLexer

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]

NOT_RUN = 'title="Needs '
BAD_INPUT = 3

_BLOCKS = RawFencedCodeBlockLexer(re.compile(r"[ ]*(?P<language>\w*)(?P<info>[^\n]*)\n"))
_COMMANDS = re.compile(r"^\$ ", re.MULTILINE)


@dataclass(frozen=True, kw_only=True)
class Command:
    """A command of a `console` block, and what it is printed to say."""

    text: str
    output: str

    @classmethod
    def all_of(cls, block):
        """The commands of a block, each up to the first line that no backslash ends."""
        for part in _COMMANDS.split(block)[1:]:
            lines = part.splitlines(keepends=True)
            last = next(number for number, line in enumerate(lines) if not line.endswith("\\\n"))
            yield cls(text="".join(lines[: last + 1]).rstrip(), output="".join(lines[last + 1 :]))


@dataclass(frozen=True, kw_only=True)
class Shell:
    """bash in a folder, with `minimax-jax` on the path and compiled programs kept between commands."""

    folder: Path
    cache: Path

    def run(self, script):
        environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
        environment |= {
            "PATH": os.pathsep.join([sysconfig.get_path("scripts"), os.environ["PATH"]]),
            "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
            "JAX_PLATFORMS": "cpu",
            **compiled.environment(self.cache),
        }
        return subprocess.run(
            ["bash", "-euo", "pipefail", "-c", script],
            cwd=self.folder,
            env=environment,
            text=True,
            capture_output=True,
            timeout=300,
        )

    def script(self, example):
        done = self.run(example.parsed)
        return f"exit code {done.returncode}:\n{done.stdout}{done.stderr}" if done.returncode else None

    def console(self, example):
        failures = (self.failure(command) for command in Command.all_of(example.parsed))
        return next((failure for failure in failures if failure), None)

    def failure(self, command):
        """What is not as printed; None if all is."""
        done = self.run(command.text)
        expected_code = BAD_INPUT if command.output.startswith("error:") else 0
        if done.returncode != expected_code:
            return f"$ {command.text}\nexit code {done.returncode}:\n{done.stdout}{done.stderr}"
        if command.output and not as_printed(command.output, said(done)):
            return f"$ {command.text}\nexpected:\n{command.output}\ngot:\n{said(done)}"
        return None


def said(done):
    """What a command has to say: its result, or its error. Progress goes to standard error, at its own times."""
    return done.stderr if done.returncode else done.stdout


def as_printed(want, got):
    """Whether an output is the printed one, apart from space at the ends of lines."""
    want, got = ("".join(f"{line.rstrip()}\n" for line in text.splitlines()) for text in (want, got))
    return doctest.OutputChecker().check_output(want, got, doctest.ELLIPSIS)


def blocks(page):
    """Regions of all fenced blocks of a page, each with its `language` and `info`."""
    return list(_BLOCKS(Document(page.read_text(), str(page))))


def is_run(region):
    return NOT_RUN not in region.lexemes["info"] and region.lexemes["language"] != "text"


def parse(page, shell):
    """A page as a document of examples."""
    evaluators = {"python": PythonEvaluator(), "console": shell.console, "bash": shell.script}

    def parser(document):
        for region in filter(is_run, _BLOCKS(document)):
            region.parsed, region.evaluator = region.lexemes["source"], evaluators[region.lexemes["language"]]
            yield region

    return Document.parse(str(page), parser)
