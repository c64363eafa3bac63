"""Processes of Python on this machine that work as one group."""

import os
import socket
import subprocess
import sys

SECONDS = 150


def free_port():
    """A port of this machine at which nobody listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start(*arguments, **environment):
    """Start `python ARGUMENTS` on the CPU, with changes to the environment."""
    return subprocess.Popen(
        [sys.executable, *map(str, arguments)],
        env=os.environ | {"JAX_PLATFORMS": "cpu"} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(group):
    """Wait for all: the statuses they end with, and what each wrote to stdout and to stderr. None outlives it."""
    try:
        said = [member.communicate(timeout=SECONDS) for member in group]
    finally:
        for member in group:
            member.kill()
    return [member.returncode for member in group], said
