"""Running commands of minimax-jax, in this process or in one of their own."""

import json
import os
import subprocess

from click.testing import CliRunner

from minimax_jax.cli import cli


def run(*arguments, code=0):
    """Standard output and standard error of a command, in this process."""
    result = CliRunner().invoke(cli, [str(argument) for argument in arguments])
    assert result.exit_code == code, (result.exit_code, result.output, result.exception)
    return result.stdout, result.stderr


def run_json(*arguments, code=0):
    stdout, stderr = run(*arguments, "--json", code=code)
    return json.loads(stdout), stderr


def process(*command, **options):
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, env=environment, **options)
