"""Checkpoint folders written, read and damaged with the safetensors library, for tests of jobs."""

import json

import numpy as np
import torch
from raw_safetensors import bits, library_reads
from safetensors.torch import load_file, save_file

from minimax_jax.dtypes import DTYPES
from minimax_jax.io.checkpoint import INDEX_NAME
from minimax_jax.ops.scaled import BlockScaled

SUFFIX = "_scale_inv"
SIDECAR = "source_scales.safetensors"
_TORCH = {"F8_E4M3": torch.float8_e4m3fn, "BF16": torch.bfloat16, "F32": torch.float32, "F16": torch.float16}
_NAME = {DTYPES[name]: name for name in _TORCH}


def weight_files(folder):
    """The files of weights: those that the index names, or the only one."""
    index = folder / INDEX_NAME
    if index.exists():
        return sorted({folder / name for name in json.loads(index.read_bytes())["weight_map"].values()})
    return [folder / "model.safetensors"]


def stored(folder):
    """Key to dtype, shape and bytes, as the safetensors library reads them."""
    found = {}
    for file in weight_files(folder):
        tensors = library_reads(file.read_bytes())
        assert not found.keys() & tensors.keys()
        found |= tensors
    return found


def arrays(folder):
    """Key to numpy array, as the safetensors library reads them."""
    return {
        key: np.frombuffer(data, DTYPES[dtype]).reshape(shape) for key, (dtype, shape, data) in stored(folder).items()
    }


def scaled_weights(folder):
    """Names of the weights that have block scales."""
    tensors = stored(folder)
    return {key for key in tensors if key + SUFFIX in tensors}


def described(tree):
    """Key to dtype, shape and bytes of a tree in memory; a `BlockScaled` is its codes and its scales."""
    found = {}
    for key, leaf in tree.items():
        parts = {key: leaf.values, key + SUFFIX: leaf.scale_inv} if isinstance(leaf, BlockScaled) else {key: leaf}
        for name, part in parts.items():
            array = np.asarray(part)
            found[name] = (_NAME[array.dtype], list(array.shape), array.tobytes())
    return found


def write(folder, tree, config):
    """A checkpoint in one file, by the safetensors library."""
    folder.mkdir(parents=True)
    tensors = {}
    for key, (dtype, shape, data) in described(tree).items():
        tensors[key] = torch.frombuffer(bytearray(data), dtype=_TORCH[dtype]).reshape(shape)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config.to_dict()))
    return folder


def edit(folder, key, change):
    """Change one tensor where it is stored: `change` gets it as torch sees it, and returns what to write instead."""
    for file in (*weight_files(folder), folder / SIDECAR):
        if file.exists() and key in (tensors := load_file(file)):
            tensors[key] = change(tensors[key])
            save_file(tensors, file, _metadata(file))
            return
    raise KeyError(key)


def flip_bit(folder, key, bit):
    """Flip one bit of the bytes of a tensor."""

    def change(tensor):
        data = bytearray(bits(tensor))
        data[bit // 8] ^= 1 << bit % 8
        return torch.frombuffer(data, dtype=tensor.dtype).reshape(tensor.shape)

    edit(folder, key, change)


def edit_json(file, **changes):
    """Set fields of a JSON object; None takes a field out."""
    found = json.loads(file.read_bytes()) | changes
    file.write_text(json.dumps({name: value for name, value in found.items() if value is not None}))


def files(folder):
    """Every file in a folder, hidden ones too, by name."""
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def converted(folder):
    """As `files`, without the model card, which says what a conversion was made from."""
    return {name: content for name, content in files(folder).items() if name != "README.md"}


def _metadata(file):
    with file.open("rb") as stream:
        header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
    return header.get("__metadata__")
