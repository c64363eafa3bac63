"""Digests of what a checkpoint holds: of each tensor, of the files around the tensors, and of the whole."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy.typing as npt

from minimax_jax.dtypes import NAMES
from minimax_jax.io import source as places
from minimax_jax.io.checkpoint import side_files
from minimax_jax.io.files import FileState
from minimax_jax.io.location import Location
from minimax_jax.jobs.compare import bytes_of
from minimax_jax.jobs.source import Source
from minimax_jax.layout.config import CONFIG_NAME

_PIECE_BYTES = 2**22


@dataclass(frozen=True, kw_only=True, slots=True)
class Digest:
    """One tensor of the Hugging Face form: what it is, and the SHA-256 of its bytes."""

    key: str
    dtype: str
    shape: tuple[int, ...]
    sha256: str


@dataclass(frozen=True, kw_only=True, slots=True)
class FileDigest:
    """One file of a checkpoint.

    Attributes:
        name: path in the checkpoint's folder.
        nbytes: size of the whole file.
        sha256: of all its bytes; of a file of weights, of all but the model's tensors, which have digests of their own:
            of what stands before the data, and of tensors that were left out. Together they leave no byte out.
        of_weights: whether it is a file of weights.
    """

    name: str
    nbytes: int
    sha256: str
    of_weights: bool


def digest_of(key: str, tensor: npt.NDArray[Any]) -> Digest:
    """The digest of a tensor in memory."""
    sha256 = hashlib.sha256(bytes_of(tensor).data).hexdigest()
    return Digest(key=key, dtype=NAMES[tensor.dtype], shape=tensor.shape, sha256=sha256)


def overall(digests: Iterable[Digest]) -> str:
    """One digest for many: over name, dtype, shape and digest of each tensor, in the order of names."""
    lines = (f"{d.key} {d.dtype} {list(d.shape)} {d.sha256}\n" for d in digests)
    return hashlib.sha256("".join(sorted(lines)).encode()).hexdigest()


def config_digest(source: Source) -> str:
    """The SHA-256 of what config.json says, in canonical form: the same for any layout, whoever wrote the file.

    The block size counts where weights are FP8; a float checkpoint may know it from a sidecar or not.
    """
    is_fp8 = "F8_E4M3" in source.survey.dtypes.values()
    config = source.config.replace(weight_block_size=source.config.block if is_fp8 else None)
    return hashlib.sha256(json.dumps(config.to_dict(), sort_keys=True).encode()).hexdigest()


def file_digests(source: Source) -> Iterator[FileDigest]:
    """The files of a checkpoint: weights, index, config, sidecar and side files. No weight of the model is read.

    Bytes of tensors that were left out are read; of an Orbax checkpoint, which hides what files it has, they are not.

    Raises:
        FormatError: a file is lost, cannot be read, or has changed since the checkpoint was opened.
    """
    checkpoint = source.checkpoint
    folder = source.path if places.is_folder(source.path) else source.path.parent
    ranges = _ranges_of_weights(source)
    for file in checkpoint.files:
        yield _file_digest(file, folder, checkpoint.states.get(file), ranges.get(file))
    index = () if checkpoint.index_file is None else (checkpoint.index_file,)
    sidecar = sorted({info.file for info in source.sidecar.values()})
    for file in (*index, folder / CONFIG_NAME, *sidecar, *side_files(source.path)):
        yield _file_digest(file, folder, checkpoint.states.get(file))


def _ranges_of_weights(source: Source) -> dict[Location, list[tuple[int, int]]]:
    """Of each file of weights, the bytes that are not in a tensor of the model: from and to."""
    aside = [info for part in source.left_out for info in part.tensors]
    begins: dict[Location, int] = {}
    for info in itertools.chain(source.checkpoint.tensors.values(), aside):
        begins[info.file] = min(info.start, begins.get(info.file, info.start))
    ranges = {file: [(0, start)] for file, start in begins.items()}
    for info in sorted(aside, key=lambda info: info.start):
        ranges[info.file].append((info.start, info.stop))
    return ranges


def _file_digest(
    file: Location, folder: Location, state: FileState | None, ranges: Sequence[tuple[int, int]] | None = None
) -> FileDigest:
    """The digest of some ranges of a file of weights, or of the whole of another file."""
    opened = places.open_file(file, state)
    try:
        nbytes = opened.state.nbytes
        sha256 = hashlib.sha256()
        for start, stop in ((0, nbytes),) if ranges is None else ranges:
            for first in range(start, stop, _PIECE_BYTES):
                piece = bytearray(min(_PIECE_BYTES, stop - first))
                opened.read_into(first, memoryview(piece))
                sha256.update(piece)
    finally:
        opened.close()
    name = str(file)[len(str(folder)) + 1 :]
    return FileDigest(name=name, nbytes=nbytes, sha256=sha256.hexdigest(), of_weights=ranges is not None)
