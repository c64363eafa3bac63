"""What a process of a group runs: Python as if it had been started anew, but for what is imported already."""

import atexit
import os
import runpy
import sys

import jax


def main(files, arguments, environment, settings):
    """`python ARGUMENTS`, with its output in files and programs kept as `compiled.settings` says."""
    for descriptor, file in zip((1, 2), files, strict=True):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT), descriptor)
    os.environ.clear()
    os.environ.update(environment)
    for name, value in settings.items():
        jax.config.update(name, value)
    try:
        _python(*arguments)
    finally:
        atexit._run_exitfuncs()  # as at the end of Python, not of a fork: JAX waits there for the others


def _python(first, *others):
    if first == "-c":
        sys.argv = ["-c", *others[1:]]
        exec(others[0], {"__name__": "__main__"})
    else:
        sys.argv = [first, *others]
        runpy.run_path(first, run_name="__main__")
