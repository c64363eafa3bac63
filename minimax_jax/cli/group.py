"""The group of commands, and what all of them have in common: options, exit codes, examples."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import click

from minimax_jax import console
from minimax_jax.console import Output
from minimax_jax.errors import CheckpointError, RequestError

EXIT_DIFFERENT, EXIT_BAD_INPUT, EXIT_INTERRUPTED, EXIT_NO_READER, EXIT_TERMINATED = 1, 3, 130, 141, 143
_AS_JSON = "minimax_jax.as_json"


_EPILOG = """\b
Examples:
  minimax-jax demo                               all of it on a tiny checkpoint
  minimax-jax inspect hf://MiniMaxAI/MiniMax-M2  what it is, from its headers
  minimax-jax convert MiniMax-M2 m2-native       FP8 to bf16 grouped experts
  minimax-jax verify MiniMax-M2 m2-native        the same weights

Each command shows its own with --help. `minimax-jax completion bash` has your shell complete them. NO_COLOR takes the
colours off a terminal; there are none elsewhere.
"""


class Group(click.Group):
    """A group whose `--json` holds for what is wrong with the command line as well."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse what stands before the command."""
        ctx.meta[_AS_JSON] = "--json" in args
        with _usage_told(ctx):
            return super().parse_args(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        """Parse the rest, and run the command."""
        with _usage_told(ctx):
            return super().invoke(ctx)


@contextmanager
def _usage_told(context: click.Context) -> Iterator[None]:
    try:
        yield
    except click.UsageError as error:
        Output(as_json=context.meta[_AS_JSON]).usage(error)
        raise


@click.group(cls=Group, epilog=_EPILOG, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="minimax_jax")
def cli() -> None:
    """Move MiniMax-M2 checkpoints between Hugging Face FP8, JAX and NeMo AutoModel, exact to the bit.

    Exit codes: 0 good, 1 a difference was found, or what was planned does not fit, 2 usage, 3 bad input, 130
    interrupted, 141 nobody reads the output, 143 terminated.
    """


def command(*, examples: str) -> Callable[[Callable[..., None]], click.Command]:
    """Register a command: `--json`, `--quiet` and `--verbose` as `out`, and errors of the library as exit codes.

    Args:
        examples: lines that the help shows at its end, as they are.
    """

    def register(function: Callable[..., None]) -> click.Command:
        lines = inspect.cleandoc(examples).splitlines()
        epilog = "\n".join(["\b", "Examples:", *(f"  {line}".rstrip() for line in lines)])
        made = cli.command(epilog=epilog)(_guarded(function))
        made.params += _common()
        return made

    return register


def _common() -> list[click.Option]:
    verbose = "All rows, all problems, and the traceback of an error."
    return [
        click.Option(["--json", "as_json"], is_flag=True, help="Print one JSON document on stdout."),
        click.Option(["-q", "--quiet"], is_flag=True, help="No progress and no hints."),
        click.Option(["-v", "--verbose"], is_flag=True, help=verbose),
    ]


def _guarded(function: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(function)
    def guarded(*, as_json: bool, quiet: bool, verbose: bool, **options: Any) -> None:
        out = Output(as_json=as_json, quiet=quiet, verbose=verbose)
        with console.stoppable():
            try:
                function(out=out, **options)
            except RequestError as error:
                raise click.UsageError(str(error)) from error
            except CheckpointError as error:
                out.error(error)
                raise click.exceptions.Exit(EXIT_BAD_INPUT) from error
            except BrokenPipeError as error:
                console.let_go_of_stdout()
                raise click.exceptions.Exit(EXIT_NO_READER) from error
            except KeyboardInterrupt as error:
                out.interrupt(error)
                terminated = isinstance(error, console.Terminated)
                raise click.exceptions.Exit(EXIT_TERMINATED if terminated else EXIT_INTERRUPTED) from error

    return guarded


def main() -> None:
    """Entry point of `minimax-jax`."""
    cli()
