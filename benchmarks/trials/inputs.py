"""A table of what can be wrong with a checkpoint: each is made of a good tiny one, opened, and has to be told."""

from __future__ import annotations

import json
import math
import os
import shutil
import struct
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from minimax_jax import synthetic
from minimax_jax.dtypes import DTYPES
from minimax_jax.errors import CheckpointError
from minimax_jax.jobs import front
from trials.outcome import Outcome, in_child
from trials.raw import Tensors, read, write, write_raw

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
CONFIG = synthetic.config(layers=2, experts=3)
LAYER = "model.layers.0."
QUERY, EMBED = LAYER + "self_attn.q_proj.weight", "model.embed_tokens.weight"
EXPERT = LAYER + "block_sparse_moe.experts."
W1, SCALE = EXPERT + "1.w1.weight", "_scale_inv"


def tensors(change: Callable[[Tensors], object]) -> Callable[[Path], None]:
    """A damage to the tensors, made in place."""

    def damage(folder: Path) -> None:
        found = read(folder / WEIGHTS)
        change(found)
        write(folder / WEIGHTS, found)

    return damage


def header(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    """A damage to the header of the file, made in place; the data stays."""

    def damage(folder: Path) -> None:
        content = (folder / WEIGHTS).read_bytes()
        (length,) = struct.unpack("<Q", content[:8])
        parsed = json.loads(content[8 : 8 + length])
        change(parsed)
        write_raw(folder / WEIGHTS, json.dumps(parsed).encode(), content[8 + length :])

    return damage


def raw(text: bytes, length: int | None = None) -> Callable[[Path], None]:
    """A file with this header and nothing else."""
    return lambda folder: write_raw(folder / WEIGHTS, text, length=length)


def config(**changes: Any) -> Callable[[Path], None]:
    """Other values in config.json; None takes one out."""

    def damage(folder: Path) -> None:
        found = json.loads((folder / "config.json").read_bytes()) | changes
        (folder / "config.json").write_text(json.dumps({k: v for k, v in found.items() if v is not None}))

    return damage


def index(weight_map: Any) -> Callable[[Path], None]:
    """An index with this map, where it is a function of the true one."""

    def damage(folder: Path) -> None:
        true = dict.fromkeys(read(folder / WEIGHTS), WEIGHTS)
        (folder / INDEX).write_text(json.dumps({"weight_map": weight_map(true)}))

    return damage


def whole(file: str, content: bytes) -> Callable[[Path], object]:
    """A file with other content."""
    return lambda folder: (folder / file).write_bytes(content)


def link(target: str) -> Callable[[Path], None]:
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


REFUSED: dict[str, Callable[[Path], object]] = {
    "header longer than the file": raw(b"{}", 10**6),
    "header of 100 MB and one byte": raw(b"{}", 100_000_001),
    "header of 2^64 - 1 bytes": raw(b"{}", 2**64 - 1),
    "header of no bytes": raw(b"", 0),
    "header nested 100,000 deep": raw(b'{"x":' + b"[" * 100_000 + b"]" * 100_000 + b"}"),
    "a key twice": twice,
    "negative offset": header(lambda h: h[EMBED].update(data_offsets=[-8, h[EMBED]["data_offsets"][1]])),
    "overlapping tensors": header(lambda h: h[QUERY].update(data_offsets=[o - 8 for o in h[QUERY]["data_offsets"]])),
    "a gap between tensors": header(lambda h: h.pop(QUERY)),
    "a shape beyond 63 bits": header(lambda h: h[EMBED].update(shape=[2**40, 2**40])),
    "a dtype that does not fit its bytes": header(lambda h: h[EMBED].update(dtype="F32")),
    "an unknown dtype": header(lambda h: h[EMBED].update(dtype="F4")),
    "an incomplete download": truncated,
    "bytes behind the last tensor": lambda f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes() + b"\0"),
    "a Git LFS pointer": whole(WEIGHTS, b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"),
    "an HTML page": whole(WEIGHTS, b"<!DOCTYPE html><html></html>"),
    "a weight_map with ../": index(lambda true: true | {QUERY: f"../hf/{WEIGHTS}"}),
    "a weight_map with an absolute path": index(lambda true: true | {QUERY: "/etc/passwd"}),
    "a weight_map with a file that is not there": index(lambda true: true | {QUERY: "lost.safetensors"}),
    "a weight_map that lists a tensor too many": index(lambda true: true | {"x": WEIGHTS}),
    "a weight_map that lists a tensor too few": index(lambda true: {k: v for k, v in true.items() if k != QUERY}),
    "a weight_map that is a list": index(list),
    "an index that is no JSON": whole(INDEX, b"{"),
    "an index nested 100,000 deep": whole(INDEX, b'{"weight_map":' * 100_000),
    "a link out of the folder": link("out"),
    "a link to a device": link("/dev/zero"),
    "a link to itself": link(WEIGHTS),
    "a FIFO in place of a file": fifo,
    "a pickle": pickled,
    "a missing scale": tensors(lambda t: t.pop(W1 + SCALE)),
    "all scales missing": tensors(lambda t: dropped(t, SCALE)),
    "a scale of no weight": tensors(
        lambda t: t.update({LAYER + "block_sparse_moe.gate.weight" + SCALE: t[W1 + SCALE]})
    ),
    "scales under two names": tensors(lambda t: t.update({QUERY.replace("weight", "scale"): t[QUERY + SCALE]})),
    "a grid of another shape": tensors(lambda t: t.update({QUERY + SCALE: ("F32", [3, 3], bytes(36))})),
    "scales in bf16": tensors(lambda t: cast(t, QUERY + SCALE, "BF16")),
    "a missing layer": tensors(lambda t: dropped(t, "layers.1.")),
    "a missing expert": tensors(lambda t: dropped(t, "layers.0.block_sparse_moe.experts.2.")),
    "an extra expert": tensors(lambda t: copied(t, "experts.2.", "experts.3.")),
    "a wrong name of experts": tensors(lambda t: renamed(t, ".w1.", ".gate_proj.")),
    "a layer past the config": tensors(lambda t: copied(t, "layers.1.", "layers.2.")),
    "MTP modules that config.json does not announce": tensors(lambda t: copied(t, "layers.1.", "mtp.layers.0.")),
    "mixed dtypes in one tensor": tensors(lambda t: cast(t, W1, "BF16")),
    "a transposed weight": tensors(lambda t: turned(t, QUERY)),
    "a transposed expert": tensors(lambda t: turned(t, W1)),
    "a norm of another size": tensors(lambda t: t.update({"model.norm.weight": ("BF16", [3], bytes(6))})),
    "integers for weights": tensors(lambda t: cast(t, EMBED, "I8")),
    "another model": tensors(lambda t: renamed(t, "block_sparse_moe", "mlp")),
    "both layouts mixed": tensors(
        lambda t: t.update({LAYER + "mlp.gate.weight": t[LAYER + "block_sparse_moe.gate.weight"]})
    ),
    "no tensors at all": tensors(lambda t: t.clear()),
    "config of another model": config(model_type="llama", architectures=["LlamaForCausalLM"]),
    "config without sizes": config(hidden_size=None),
    "config with a negative size": config(num_hidden_layers=-1),
    "config with 10^12 layers": config(num_hidden_layers=10**12),
    "config with an unknown attribute": config(sliding_window=4096),
    "config without block size": config(quantization_config=None),
    "config of another quantisation": config(quantization_config={"quant_method": "awq", "bits": 4}),
    "config that is no JSON": whole("config.json", b"{"),
    "config that is missing": lambda folder: (folder / "config.json").unlink(),
}
"""What has to be refused, by name."""


def bits(key: str, dtype: type[np.generic], *values: int) -> Callable[[Path], None]:
    """The first elements of a tensor with other bits."""

    def change(found: Tensors) -> None:
        kind, shape, data = found[key]
        array = np.frombuffer(data, dtype).copy()
        array[: len(values)] = values
        found[key] = (kind, shape, array.tobytes())

    return tensors(change)


TOLD: dict[str, tuple[Callable[[Path], object], str]] = {
    "NaN codes": (bits(QUERY, np.uint8, 0x7F, 0xFF), "NaN"),
    "a NaN scale": (bits(QUERY + SCALE, np.uint32, 0x7FC00000), "NaN"),
    "an infinite scale": (bits(QUERY + SCALE, np.uint32, 0x7F800000), "infinity"),
    "a negative scale": (bits(QUERY + SCALE, np.uint32, 0xBF800000), "negative scale"),
    "a zero scale": (bits(QUERY + SCALE, np.uint32, 0), "zero scale"),
    "a subnormal scale": (bits(QUERY + SCALE, np.uint32, 1), "subnormal scale"),
    "NaN in a bf16 weight": (bits(EMBED, np.uint16, 0x7FC0), "NaN"),
}
"""What is carried along bit for bit and told by `verify`, with the word for it."""


def announced(prefix: str) -> Callable[[Path], None]:
    """MTP modules that config.json announces: a layer again, as another one, with a tensor that no layer has."""

    def damage(folder: Path) -> None:
        def more(found: Tensors) -> None:
            copied(found, "layers.1.", prefix)
            found[f"model.{prefix}eh_proj.weight"] = ("BF16", [2, 2], bytes(8))

        tensors(more)(folder)
        config(use_mtp=True, num_mtp_modules=1)(folder)

    return damage


LEFT_OUT: dict[str, Callable[[Path], object]] = {
    "MTP modules that config.json announces": announced("mtp_layers.0."),
    "MTP modules that count on past the last layer": announced("layers.2."),
}
"""What is left out by name, and said."""


def tried(folder: Path, *, refused: dict[str, Callable[[Path], object]] = REFUSED) -> Iterator[Outcome]:
    """Every bad input once."""
    good = folder / "good"
    in_child(partial(synthetic.synthesize, good, CONFIG))
    yield from in_child(lambda: [_refusal(what, good, damage) for what, damage in refused.items()])
    yield from in_child(lambda: [_telling(what, good, *told) for what, told in TOLD.items()])
    yield from in_child(lambda: [_leaving(what, good, damage) for what, damage in LEFT_OUT.items()])


def _damaged(good: Path, damage: Callable[[Path], object], use: Callable[[Path], Outcome]) -> Outcome:
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "hf"
        shutil.copytree(good, folder)
        damage(folder)
        return use(folder)


def _refusal(what: str, good: Path, damage: Callable[[Path], object]) -> Outcome:
    def use(folder: Path) -> Outcome:
        try:
            front.plan(folder)
        except CheckpointError as error:
            problem = error.problems[0]
            named = bool(problem.file or problem.key or problem.expected)
            return Outcome(what=what, count=1, gave=f"{type(error).__name__}: {problem.what}", good=named)
        except Exception as error:  # the very thing that is looked for
            return Outcome(what=what, count=1, gave=f"a crash: {error!r}", good=False)
        return Outcome(what=what, count=1, gave="let through", good=False)

    return _damaged(good, damage, use)


def _telling(what: str, good: Path, damage: Callable[[Path], object], word: str) -> Outcome:
    def use(folder: Path) -> Outcome:
        (seen,) = front.verify(folder).checkpoints
        told = ", ".join(f"{each.count} {each.what}" for each in seen.unusual)
        front.convert(folder, folder.with_name("native"), dtype="fp8")
        same = front.verify(folder, folder.with_name("native"), by="bytes").good
        gave = f"carried along bit for bit; verify tells: {told}" if same else "other bits"
        return Outcome(what=what, count=1, gave=gave, good=same and word in told)

    return _damaged(good, damage, use)


def _leaving(what: str, good: Path, damage: Callable[[Path], object]) -> Outcome:
    def use(folder: Path) -> Outcome:
        done = front.convert(folder, folder.with_name("native"), dtype="fp8")
        same = front.verify(folder.with_name("native"), good, by="bytes").good
        count = sum(len(part.keys) for part in done.left_out)
        gave = f"left out by name, and said: {count} tensors; the rest byte for byte" if same else "other bytes"
        return Outcome(what=what, count=1, gave=gave, good=same and count > 0)

    return _damaged(good, damage, use)
