"""Ways to damage a tiny checkpoint of one file: each makes a function that does it to the folder."""

from __future__ import annotations

import json
import math
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from minimax_jax.dtypes import DTYPES
from trials.raw import Tensors, read, write, write_raw

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"

Damage: TypeAlias = Callable[[Path], object]


def tensors(change: Callable[[Tensors], object]) -> Damage:
    """A damage to the tensors, made in place."""

    def damage(folder: Path) -> None:
        found = read(folder / WEIGHTS)
        change(found)
        write(folder / WEIGHTS, found)

    return damage


def header(change: Callable[[dict[str, Any]], object]) -> Damage:
    """A damage to the header of the file, made in place; the data stays."""

    def damage(folder: Path) -> None:
        content = (folder / WEIGHTS).read_bytes()
        (length,) = struct.unpack("<Q", content[:8])
        parsed = json.loads(content[8 : 8 + length])
        change(parsed)
        write_raw(folder / WEIGHTS, json.dumps(parsed).encode(), content[8 + length :])

    return damage


def raw(text: bytes, length: int | None = None) -> Damage:
    """A file with this header and nothing else."""
    return lambda folder: write_raw(folder / WEIGHTS, text, length=length)


def config(**changes: Any) -> Damage:
    """Other values in config.json; None takes one out."""

    def damage(folder: Path) -> None:
        found = json.loads((folder / "config.json").read_bytes()) | changes
        (folder / "config.json").write_text(json.dumps({k: v for k, v in found.items() if v is not None}))

    return damage


def index(weight_map: Any) -> Damage:
    """An index with this map, where it is a function of the true one."""

    def damage(folder: Path) -> None:
        true = dict.fromkeys(read(folder / WEIGHTS), WEIGHTS)
        (folder / INDEX).write_text(json.dumps({"weight_map": weight_map(true)}))

    return damage


def whole(file: str, content: bytes) -> Damage:
    """A file with other content."""
    return lambda folder: (folder / file).write_bytes(content)


def link(target: str) -> Damage:
    """The weights as a link to somewhere else."""

    def damage(folder: Path) -> None:
        place = folder.parent / "elsewhere"
        shutil.move(folder / WEIGHTS, place)
        (folder / WEIGHTS).symlink_to(place if target == "out" else target)

    return damage


def fifo(folder: Path) -> None:
    """A FIFO in place of the weights."""
    (folder / WEIGHTS).unlink()
    os.mkfifo(folder / WEIGHTS)


def truncated(folder: Path) -> None:
    """Half of the weights."""
    os.truncate(folder / WEIGHTS, (folder / WEIGHTS).stat().st_size // 2)


def pickled(folder: Path) -> None:
    """A pickle in place of safetensors."""
    (folder / WEIGHTS).rename(folder / "pytorch_model.bin")


def turned(found: Tensors, key: str) -> None:
    """A weight with its axes exchanged."""
    dtype, shape, data = found[key]
    found[key] = (dtype, shape[::-1], data)


def cast(found: Tensors, key: str, dtype: str) -> None:
    """A weight of another dtype."""
    _, shape, _ = found[key]
    found[key] = (dtype, shape, bytes(math.prod(shape) * DTYPES[dtype].itemsize))


def renamed(found: Tensors, old: str, new: str) -> None:
    """Every key with some text replaced."""
    for key in list(found):
        found[key.replace(old, new)] = found.pop(key)


def dropped(found: Tensors, text: str) -> None:
    """All keys with some text gone."""
    for key in [key for key in found if text in key]:
        del found[key]


def copied(found: Tensors, old: str, new: str) -> None:
    """Keys with some text twice, the second time with other text."""
    found.update({key.replace(old, new): one for key, one in list(found.items()) if old in key})


def twice(folder: Path) -> None:
    """A header that names one key twice."""
    one = b'"x":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}'
    write_raw(folder / WEIGHTS, b"{" + one + b"," + one + b"}", b"\0")


def bits(key: str, dtype: type[np.generic], *values: int) -> Damage:
    """The first elements of a tensor with other bits."""

    def change(found: Tensors) -> None:
        kind, shape, data = found[key]
        array = np.frombuffer(data, dtype).copy()
        array[: len(values)] = values
        found[key] = (kind, shape, array.tobytes())

    return tensors(change)


def announced(prefix: str) -> Damage:
    """MTP modules that config.json announces: a layer again, as another one, with a tensor that no layer has."""

    def damage(folder: Path) -> None:
        def more(found: Tensors) -> None:
            copied(found, "layers.1.", prefix)
            found[f"model.{prefix}eh_proj.weight"] = ("BF16", [2, 2], bytes(8))

        tensors(more)(folder)
        config(use_mtp=True, num_mtp_modules=1)(folder)

    return damage
