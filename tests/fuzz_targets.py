"""What is fuzzed: each parser with what must hold of it for any bytes whatever.

A target takes the content of a file and returns whether it was accepted. It fails where the parser raises anything but
an error of this project, or accepts what somebody else reads differently.
"""

import contextlib
import functools
import hashlib
import io
import json
import math
import tempfile
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed.checkpoint
from raw_safetensors import entry, library_reads, raw_bytes, write_file

from minimax_jax import synthetic
from minimax_jax.dtypes import DTYPES
from minimax_jax.errors import CheckpointError
from minimax_jax.io import dcp
from minimax_jax.io.checkpoint import INDEX_NAME, open_checkpoint
from minimax_jax.io.dcp_reader import ChunkedArray
from minimax_jax.io.header import serialise_header
from minimax_jax.io.journal import Journal, has_records, read_journals
from minimax_jax.io.reader import Reader
from minimax_jax.io.source import LocalFile
from minimax_jax.io.torch_archive import find_tensor
from minimax_jax.jobs.certified import FORMAT, read_certificate, seal
from minimax_jax.jobs.digests import overall
from minimax_jax.jobs.source import SIDECAR, open_source, sidecar_metadata
from minimax_jax.layout.config import MiniMaxConfig
from minimax_jax.layout.specs import TensorSpec, specs
from torch_bridge.dcp_writer import Nameless

CONFIG = synthetic.config(layers=1, experts=1)
STAMP = {"version": "0", "target": "native BF16"}
RECORD = {"unit": "x 0+8", "xxh3_128": "00", "kept_scales": 0, "fresh_scales": []}


def header(content: bytes) -> bool:
    """A safetensors file: where it is read, the safetensors library reads the same."""
    file = _folder("header") / "model.safetensors"
    file.write_bytes(content)
    try:
        checkpoint = open_checkpoint(file)
        with Reader(checkpoint) as reader:
            for read in (reader.read, reader.view):
                ours = {key: (info.dtype, read(info)) for key, info in checkpoint.tensors.items()}
                found = {key: (dtype, list(array.shape), array.tobytes()) for key, (dtype, array) in ours.items()}
                assert found == library_reads(content)
    except CheckpointError:
        return False
    return True


def index(content: bytes) -> bool:
    """An index beside two files: it is accepted only where it names the true file of every tensor."""
    folder = _folder("index")
    (folder / INDEX_NAME).write_bytes(content)
    try:
        checkpoint = open_checkpoint(folder)
    except CheckpointError:
        return False
    found = {key: str(Path(str(info.file)).relative_to(folder)) for key, info in checkpoint.tensors.items()}
    named = {key: str(Path(name)) for key, name in json.loads(content)["weight_map"].items()}
    held = {"x.safetensors": {"a", "b"}, "y.safetensors": {"c"}}
    assert found and found == named == {key: name for name in {*named.values()} for key in held[name]}
    return True


def config(content: bytes) -> bool:
    """A config.json: what is read says what the text says, and comes back the same from what is written."""
    try:
        read = MiniMaxConfig.from_json(content, file="config.json")
    except CheckpointError:
        return False
    raw = json.loads(content)
    for name in ("vocab_size", "hidden_size", "num_hidden_layers", "num_local_experts", "intermediate_size"):
        assert type(raw[name]) is int and raw[name] == getattr(read, name) > 0
    assert MiniMaxConfig.from_dict(json.loads(json.dumps(read.to_dict())), ignore=read.extra) == read
    return True


def journal(content: bytes) -> bool:
    """A journal: records are lines of the file, only under the right stamp; what is noted later is never lost."""
    folder = _folder("journal")
    file = folder / ".journal.0"
    file.write_bytes(content)
    has_records(folder)
    try:
        found = list(read_journals(folder, STAMP))
        with Journal(folder, STAMP) as opened:
            opened.note(RECORD)
        later = list(read_journals(folder, STAMP))
    except CheckpointError:
        return False
    lines = content.split(b"\n")
    assert not found or json.loads(lines[0]) == STAMP
    assert all(record in [_parsed(line) for line in lines[1:]] for record in found)
    assert later == [*found, RECORD]
    return bool(found)


def sidecar(content: bytes) -> bool:
    """Source scales beside a native checkpoint: they are accepted only with the right names, dtypes and shapes."""
    folder = _folder("sidecar")
    (folder / SIDECAR).write_bytes(content)
    try:
        found = open_source(folder).sidecar
    except CheckpointError:
        return False
    expected = {spec.key: list(spec.shape) for spec in _scales()}
    for key, (dtype, shape, _) in library_reads(content).items():
        assert key in found and dtype == "F32" and shape == expected[key] == list(found[key].shape)
    return True


def certificate(content: bytes) -> bool:
    """A certificate: it is accepted only where its seal and the digest of each whole fit."""
    file = _folder("certificate") / "certificate.json"
    file.write_bytes(content)
    try:
        read = read_certificate(file)
    except CheckpointError:
        return False
    document = json.loads(content)
    sealed = document.pop("seal")
    assert sealed == hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()
    for told, checkpoint in zip(document["checkpoints"], read.checkpoints, strict=True):
        assert told["sha256"] == overall(checkpoint.tensors.values())
    return True


def contents(content: bytes) -> bool:
    """A table of contents of torch.distributed.checkpoint: each tensor has all of its elements, each of them once."""
    folder = _folder("contents")
    (folder / dcp.METADATA_NAME).write_bytes(content)
    try:
        found = dcp.describe(folder)
    except CheckpointError:
        return False
    for tensor in found.tensors.values():
        filled = np.zeros(tensor.shape, np.uint8)
        for chunk in tensor.chunks:
            filled[tuple(slice(at, at + size) for at, size in zip(chunk.offsets, chunk.sizes, strict=True))] += 1
        assert (filled == 1).all()
        with contextlib.suppress(CheckpointError):  # the table may take one chunk for another
            assert ChunkedArray(tensor, found.states).read_region(()).shape == tensor.shape
    return True


def archive(content: bytes) -> bool:
    """A tensor as `torch.save` writes it: where it is read, torch reads the same, if it reads it at all."""
    file = _folder("archive") / "x.distcp"
    file.write_bytes(content)
    try:
        with contextlib.closing(LocalFile(file)) as opened:
            found = find_tensor(opened, 0, len(content), file=file, key="x")
            if math.prod(found.shape) > 2**20:  # some rows can be told to be repeated without end
                return True
            array = np.empty(found.shape, DTYPES[found.dtype])
            found.fill(opened, tuple(slice(0, size) for size in found.shape), array)
    except CheckpointError:
        return False
    try:
        theirs = torch.load(io.BytesIO(content), weights_only=True)
    except Exception:  # torch says of damage what it likes
        return True
    told = str(theirs.dtype).removeprefix("torch."), tuple(theirs.shape), _bytes(theirs)
    assert told == (array.dtype.name, array.shape, array.tobytes())
    return True


TARGETS: dict[str, Callable[[bytes], bool]] = {
    target.__name__: target for target in (header, index, config, journal, sidecar, certificate, contents, archive)
}


def resealed(document: Any) -> bytes:
    """A certificate with a seal that fits, whatever else is wrong with it."""
    return json.dumps(document | {"seal": seal(document)} if isinstance(document, dict) else document).encode()


def seeds() -> dict[str, list[bytes]]:
    """Small contents that each parser accepts."""
    tensors = {"a": entry("F32", [2, 2], 0, 16), "b": entry("F8_E4M3", [4], 16, 20)}
    quantized = json.dumps(CONFIG.to_dict(), separators=(",", ":")).encode()
    v5 = {name: value for name, value in CONFIG.to_dict().items() if name not in ("rotary_dim", "attn_type_list")}
    lines = [json.dumps(STAMP), json.dumps(RECORD), json.dumps(RECORD | {"unit": "y 0+8"})]
    return {
        "header": [raw_bytes(tensors | {"__metadata__": {"format": "pt"}}, bytes(20)), raw_bytes({}, b"")],
        "index": [json.dumps({"metadata": {"total_size": 3}, "weight_map": _weight_map()}).encode()],
        "config": [quantized, json.dumps(v5).encode()],
        "journal": [("\n".join(lines) + "\n").encode(), ("\n".join(lines) + '\n{"unit').encode()],
        "sidecar": [_safetensors(list(_scales()), sidecar_metadata(CONFIG))],
        "certificate": [resealed(_certificate())],
        "contents": [(_folder("contents") / dcp.METADATA_NAME).read_bytes()],
        "archive": [_archive(_TENSORS["a"].T), _archive(_TENSORS["b"])],
    }


_TENSORS = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(4).to(torch.float8_e4m3fn), "c": torch.tensor(7)}


def _archive(tensor: torch.Tensor) -> bytes:
    stream = io.BytesIO()
    torch.save(tensor, stream)
    return stream.getvalue()


def _bytes(tensor: torch.Tensor) -> bytes:
    content: bytes = tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()
    return content


def _certificate() -> dict[str, Any]:
    tensor = {"dtype": "F32", "shape": [2], "sha256": "00"}
    whole = hashlib.sha256(b"t F32 [2] 00\n").hexdigest()
    files: dict[str, Any] = {"config.json": {"bytes": 2, "sha256": "00", "of": "file"}}
    files["x.safetensors"] = {"bytes": 2, "sha256": "00", "of": "header", "metadata": {"format": "00"}}
    one = {
        "path": "p",
        "layout": "hf",
        "sha256": whole,
        "config_sha256": "00",
        "files": files,
        "left_out_tensors": {"m": tensor},
    }
    return {"format": FORMAT, "options": {"sample": None}, "checkpoints": [one], "tensors": {"t": tensor}}


def _weight_map() -> dict[str, str]:
    return {"a": "x.safetensors", "b": "x.safetensors", "c": "y.safetensors"}


def _parsed(line: bytes) -> object:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


def _scales() -> Iterable[TensorSpec]:
    found = specs(CONFIG)
    return [spec for spec in found.native("F8_E4M3") if spec.key.endswith("_scale_inv")]


def _safetensors(tensors: list[TensorSpec], metadata: dict[str, str]) -> bytes:
    head = serialise_header([(spec.key, spec.dtype, spec.shape, spec.nbytes) for spec in tensors], metadata)
    return head + bytes(sum(spec.nbytes for spec in tensors))


@functools.cache
def _folder(name: str) -> Path:
    """A folder for one target, with what has to lie beside the file that is fuzzed."""
    root = Path(_root().name) / name
    root.mkdir()
    if name == "index":
        write_file(root / "x.safetensors", a=(2,), b=(1, 1))
        write_file(root / "y.safetensors", c=(3,))
    if name == "contents":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns that it is not distributed
            torch.distributed.checkpoint.save({**_TENSORS, "step": 3}, storage_writer=Nameless(root))
    if name == "sidecar":
        bare = {name: value for name, value in CONFIG.to_dict().items() if name != "quantization_config"}
        (root / "config.json").write_text(json.dumps(bare))
        (root / "model.safetensors").write_bytes(_safetensors(list(specs(CONFIG).native("BF16")), {}))
    return root


@functools.cache
def _root() -> tempfile.TemporaryDirectory[str]:
    """Lives as long as the process."""
    return tempfile.TemporaryDirectory()


def write_seeds(folder: Path) -> None:
    """Write the seeds as files, one folder for each target."""
    for name, contents in seeds().items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        for number, content in enumerate(contents):
            (folder / name / f"seed-{number}").write_bytes(content)
