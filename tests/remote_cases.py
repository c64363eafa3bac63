"""Checkpoints to serve, and reading them whole from their server."""

import contextlib

import folders
from raw_safetensors import write_file
from servers import serving

import minimax_jax as mj
from minimax_jax import synthetic
from minimax_jax.io import remote
from minimax_jax.io.checkpoint import open_checkpoint
from minimax_jax.io.location import locate
from minimax_jax.io.reader import Reader

CONFIG = synthetic.config(layers=1, experts=3)


def make(root):
    """A checkpoint in several files, one converted from it with a sidecar, and that as one file."""
    synthetic.synthesize(root / "hf", CONFIG, shard_bytes=60_000)
    mj.convert(root / "hf", root / "native")
    return root


@contextlib.contextmanager
def serving_large(folder):
    """A file with a tensor of many blocks, small ones around it: its server, and the bytes of tensors by key."""
    write_file(folder / "model.safetensors", a=(7,), b=(1000, 3), big=(5 * remote.BLOCK_BYTES + 11,), c=(50,))
    with serving(folder) as server:
        yield server, {key: data for key, (_, _, data) in folders.stored(folder).items()}


def read_all(server):
    checkpoint = open_checkpoint(locate(server.url))
    with Reader(checkpoint) as reader:
        return {key: reader.read(info).tobytes() for key, info in checkpoint.tensors.items()}
