"""Writes anew what the commands of pages print: `python tests/refresh_pages.py docs/troubleshooting.md`; then look."""

import os
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")

from pages import BAD_INPUT, Command, Shell, as_printed, parse, said


def refreshed(page, shell):
    """The text of a page with the outputs that are not as printed, and those of errors, as they are now."""
    document = parse(page, shell)
    text = document.text
    for example in document:
        if example.region.lexemes["language"] != "console":
            example.evaluate()
            continue
        block = "".join(_anew(command, shell) for command in Command.all_of(example.parsed))
        text = text.replace(example.parsed, block, 1)
    return text


def _anew(command, shell):
    done = shell.run(command.text)
    output = command.output
    if done.returncode == BAD_INPUT or (output and not as_printed(output, said(done))):
        output = "".join(f"{line.rstrip()}\n" for line in said(done).splitlines())
    return f"$ {command.text}\n{output}"


def main():
    for page in [Path(name).absolute() for name in sys.argv[1:]]:
        with tempfile.TemporaryDirectory() as folder:
            os.chdir(folder)
            page.write_text(refreshed(page, Shell(folder=Path(folder), cache=Path(folder) / ".compiled")))


if __name__ == "__main__":
    main()
