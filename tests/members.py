"""Processes of Python on this machine that work as one group."""

import os
import socket
import tempfile
from pathlib import Path

import compiled
import forked
import jax
import member_process

SECONDS = 150


class Member:
    """A process of a group; what it writes goes to files, so that no other has to wait for who reads them."""

    def __init__(self, arguments, environment):
        self._said = tempfile.TemporaryDirectory()
        self._files = [Path(self._said.name) / name for name in ("stdout", "stderr")]
        settings = compiled.settings(jax.config.jax_compilation_cache_dir)
        shared = (self._files, [*map(str, arguments)], os.environ | {"JAX_PLATFORMS": "cpu"} | environment, settings)
        (self._process,) = forked.start(member_process.main, shared)

    @property
    def returncode(self):
        """What it ended with; below zero, the signal that ended it."""
        return self._process.exitcode

    def wait(self, timeout):
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise TimeoutError(f"no end in {timeout} s")

    def communicate(self, timeout):
        """Wait for its end: what it wrote to stdout and to stderr."""
        self.wait(timeout)
        return tuple(file.read_text() for file in self._files)

    def kill(self):
        self._process.kill()
        self._process.join()

    def forget(self):
        """Kill it, and take away what it wrote."""
        self.kill()
        self._said.cleanup()


def free_port():
    """A port of this machine at which nobody listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start(*arguments, **environment):
    """Start `python ARGUMENTS` (`-c CODE ...` or `FILE ...`) on the CPU, with changes to the environment."""
    return Member(arguments, environment)


def finish(group):
    """Wait for all: the statuses they end with, and what each wrote to stdout and to stderr. None outlives it."""
    try:
        said = [member.communicate(timeout=SECONDS) for member in group]
    finally:
        for member in group:
            member.forget()
    return [member.returncode for member in group], said
