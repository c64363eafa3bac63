"""The command line: parse, call, show. No logic, and no heavy import before a command runs.

Each command is a module; importing it adds the command to the group.
"""

from minimax_jax.cli import completion, convert, demo, diff, generate, inspect, plan, push, report, synth, verify
from minimax_jax.cli.group import cli, main

__all__ = [
    "cli",
    "completion",
    "convert",
    "demo",
    "diff",
    "generate",
    "inspect",
    "main",
    "plan",
    "push",
    "report",
    "synth",
    "verify",
]
