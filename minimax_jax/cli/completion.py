"""`minimax-jax completion`."""

from __future__ import annotations

import click
from click.shell_completion import BashComplete, FishComplete, ShellComplete, ZshComplete

from minimax_jax.cli.group import cli, command
from minimax_jax.console import Output

PROGRAM, VARIABLE = "minimax-jax", "_MINIMAX_JAX_COMPLETE"

_SHELLS: dict[str, type[ShellComplete]] = {"bash": BashComplete, "zsh": ZshComplete, "fish": FishComplete}


@command(
    examples="""
    eval "$(minimax-jax completion bash)"                                       in ~/.bashrc
    eval "$(minimax-jax completion zsh)"                                        in ~/.zshrc
    minimax-jax completion fish > ~/.config/fish/completions/minimax-jax.fish   once
    """
)
@click.argument("shell", type=click.Choice(list(_SHELLS)))
def completion(shell: str, out: Output) -> None:
    """Print the script that has a shell complete commands, options and paths."""
    script = _SHELLS[shell](cli, {}, PROGRAM, VARIABLE).source().strip()
    out.show(lambda script: {"shell": shell, "script": script}, lambda script: [script], script)
