"""Running commands of minimax-jax, in this process or in one of their own, and what they are run on."""

import json
import os
import subprocess

from click.testing import CliRunner

import minimax_jax as mj
from minimax_jax import synthetic
from minimax_jax.cli import cli

CONFIG = synthetic.config(layers=1, experts=3)
EMBED = "model.embed_tokens.weight"


def make(root):
    """A checkpoint in several files, and one converted from it."""
    synthetic.synthesize(root / "hf", CONFIG, shard_bytes=60_000)
    mj.convert(root / "hf", root / "native")
    return root


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
